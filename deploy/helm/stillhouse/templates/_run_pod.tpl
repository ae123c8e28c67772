{{/* The pod of a run: {root, name, run (with defaults)}. */}}
{{- define "stillhouse.runPod" -}}
{{- $values := .root.Values -}}
{{- $run := .run -}}
{{- $full := include "stillhouse.name" . -}}
metadata:
  labels:
    {{- include "stillhouse.podLabels" (dict "root" .root "component" "run" "name" .name) | nindent 4 }}
spec:
  serviceAccountName: {{ $run.serviceAccountName | default $full | quote }}
  automountServiceAccountToken: false
  restartPolicy: Never
  {{- include "stillhouse.podBasics" (dict "root" .root "of" $run) | nindent 2 }}
  {{- with $run.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  # SIGTERM: it finishes its step and saves.
  terminationGracePeriodSeconds: {{ $run.saveSeconds | int }}
  {{- if gt (int $run.nodes) 1 }}
  subdomain: {{ $full }}
  {{- end }}
  containers:
    - name: trainer
      image: {{ include "stillhouse.image" (dict "root" .root "name" "trainer" "full" $values.images.trainer) }}
      imagePullPolicy: {{ $values.images.pullPolicy }}
      command: [student-trainer]
      args:
        {{- if or (gt (int $run.nodes) 1) (gt (int $run.gpusPerNode) 1) }}
        - launch
        - --nnodes={{ $run.nodes | int }}
        - --nproc-per-node={{ max 1 (int $run.gpusPerNode) }}
        - --rdzv-backend=c10d
        {{- if gt (int $run.nodes) 1 }}
        - --rdzv-endpoint={{ $full }}-0.{{ $full }}:29400
        - --rdzv-id={{ $full }}
        - --rdzv-conf=join_timeout=1800
        {{- else }}
        - --rdzv-endpoint=localhost:0
        {{- end }}
        - --
        {{- end }}
        - train
        - /etc/stillhouse/run/run.yaml
        - --resume
        - --stopped-status=75
        - run_dir=/runs/{{ .name }}
        - metrics_host={{ $values.listenAddress | trimPrefix "[" | trimSuffix "]" | quote }}
        - metrics_port=9465
        - metrics_hold_s=60
        {{- if $run.tlsSecret }}
        - teacher.tls_ca=/etc/stillhouse/tls/ca.crt
        {{- if not (or $run.tokenSecret $run.serviceAccountToken) }}
        - teacher.tls_certificate=/etc/stillhouse/tls/tls.crt
        - teacher.tls_key=/etc/stillhouse/tls/tls.key
        {{- end }}
        {{- end }}
        {{- if or $run.tokenSecret $run.serviceAccountToken }}
        - teacher.token_file=/etc/stillhouse/token/token
        {{- end }}
      env:
        {{- include "stillhouse.env" (dict "own" $run.env "fixed" (dict "HF_HUB_OFFLINE" "1")) | trim | nindent 8 }}
      ports:
        - name: metrics
          containerPort: 9465
      terminationMessagePolicy: FallbackToLogsOnError
      {{- include "stillhouse.resources" (dict "gpus" $run.gpusPerNode "gpuResource" $run.gpuResource "cpu" $run.cpu "memory" $run.memory) | nindent 6 }}
      {{- include "stillhouse.containerSecurity" .root | nindent 6 }}
      volumeMounts:
        - name: config
          mountPath: /etc/stillhouse/run
          readOnly: true
        - name: runs
          mountPath: /runs
        {{- if $run.modelsClaim }}
        - name: models
          mountPath: /models
          readOnly: true
        {{- end }}
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        {{- if $run.tlsSecret }}
        - name: tls
          mountPath: /etc/stillhouse/tls
          readOnly: true
        {{- end }}
        {{- if or $run.tokenSecret $run.serviceAccountToken }}
        - name: token
          mountPath: /etc/stillhouse/token
          readOnly: true
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ $full }}
    - name: runs
      persistentVolumeClaim:
        claimName: {{ $run.runsClaim | quote }}
    {{- if $run.modelsClaim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ $run.modelsClaim | quote }}
        readOnly: true
    {{- end }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $run.sharedMemory | quote }}
    # Optional, so that a missing one is said by the program and not by a pod that waits.
    {{- if $run.tlsSecret }}
    - name: tls
      secret:
        secretName: {{ $run.tlsSecret | quote }}
        optional: true
        defaultMode: 0440
    {{- end }}
    {{- if $run.serviceAccountToken }}
    - name: token
      projected:
        defaultMode: 0440
        sources:
          - serviceAccountToken:
              audience: {{ $run.audience | quote }}
              expirationSeconds: 3600
              path: token
    {{- else if $run.tokenSecret }}
    - name: token
      secret:
        secretName: {{ $run.tokenSecret | quote }}
        optional: true
        defaultMode: 0440
    {{- end }}
{{- end }}
