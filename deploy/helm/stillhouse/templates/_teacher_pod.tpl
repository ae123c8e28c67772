{{/* The pod of a teacher: {root, name, teacher (with defaults)}. */}}
{{- define "stillhouse.teacherPod" -}}
{{- $values := .root.Values -}}
{{- $teacher := .teacher -}}
{{- $onCpu := and (eq (int $teacher.gpus) 0) -}}
{{- $image := include "stillhouse.image" (dict "root" .root "name" (ternary "teacher-cpu" "teacher" $onCpu) "full" (ternary $values.images.teacherCpu $values.images.teacher $onCpu)) -}}
metadata:
  labels:
    {{- include "stillhouse.podLabels" (dict "root" .root "component" "teacher" "name" .name) | nindent 4 }}
  annotations:
    kubectl.kubernetes.io/default-container: teacher
spec:
  serviceAccountName: {{ .root.Release.Name }}-teacher
  automountServiceAccountToken: {{ $values.access.tokenReview }}
  {{- include "stillhouse.podBasics" (dict "root" .root "of" $teacher) | nindent 2 }}
  {{- if or $teacher.priorityClassName $values.priorityClass.create }}
  priorityClassName: {{ $teacher.priorityClassName | default (include "stillhouse.priorityClass" .root) | quote }}
  {{- end }}
  # preStop, the drain, and what ending takes.
  terminationGracePeriodSeconds: {{ add 5 (int $teacher.drainSeconds) 20 }}
  {{- if eq (int $teacher.nodes) 1 }}
  topologySpreadConstraints:
    {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ $key }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "stillhouse.selector" (dict "root" $.root "component" "teacher" "name" $.name) | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- if $teacher.model.repository }}
  initContainers:
    # Once: a directory that was downloaded whole is not looked up again, so the pool restarts without the hub.
    - name: download
      image: {{ $image }}
      imagePullPolicy: {{ $values.images.pullPolicy }}
      command: ["/bin/sh", "-c"]
      args:
        - >-
          test -e "$DIRECTORY/.complete" || {
          echo "downloading $REPOSITORY at $COMMIT into $DIRECTORY" &&
          hf download "$REPOSITORY" --revision "$COMMIT" --local-dir "$DIRECTORY" &&
          touch "$DIRECTORY/.complete"; }
      env:
        {{- include "stillhouse.env" (dict "own" $teacher.env "fixed" (dict "REPOSITORY" $teacher.model.repository "COMMIT" $teacher.model.commit "DIRECTORY" (include "stillhouse.modelPath" $teacher))) | trim | nindent 8 }}
        {{- if $teacher.tokenSecret }}
        - name: HF_TOKEN_PATH
          value: /etc/stillhouse/hub/token
        {{- end }}
      {{- include "stillhouse.resources" (dict "cpu" $teacher.cpu "memory" $teacher.memory) | nindent 6 }}
      {{- include "stillhouse.containerSecurity" .root | nindent 6 }}
      volumeMounts:
        - name: models
          mountPath: /models
        - name: tmp
          mountPath: /tmp
        {{- if $teacher.tokenSecret }}
        - name: hub
          mountPath: /etc/stillhouse/hub
          readOnly: true
        {{- end }}
  {{- end }}
  containers:
    - name: teacher
      image: {{ $image }}
      imagePullPolicy: {{ $values.images.pullPolicy }}
      command: [teacher-server]
      args:
        {{- include "stillhouse.teacherArgs" . | nindent 8 }}
      env:
        {{- include "stillhouse.env" (dict "own" $teacher.env "fixed" (dict "HF_HUB_OFFLINE" "1" "VLLM_NO_USAGE_STATS" "1")) | trim | nindent 8 }}
      ports:
        - name: grpc
          containerPort: 50051
        - name: metrics
          containerPort: 9464
        - name: health
          containerPort: 8080
      startupProbe: # until it is loaded and has checked itself
        grpc:
          port: 8080
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ max 1 (div (add (int $teacher.loadSeconds) 9) 10) }}
      readinessProbe: # loaded, the engine moves, not stopping
        grpc:
          port: 8080
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe: # the program moves; a long queue is no reason
        grpc:
          port: 8080
          service: liveness
        periodSeconds: 20
        timeoutSeconds: 5
        failureThreshold: 3
      lifecycle:
        preStop: # until whoever watches endpoints has turned away; then SIGTERM drains
          exec:
            command: [sleep, "5"]
      terminationMessagePolicy: FallbackToLogsOnError
      {{- include "stillhouse.resources" $teacher | nindent 6 }}
      {{- include "stillhouse.containerSecurity" .root | nindent 6 }}
      volumeMounts:
        - name: models
          mountPath: /models
          readOnly: true
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        {{- if $values.tls.secret }}
        - name: tls
          mountPath: /etc/stillhouse/tls
          readOnly: true
        {{- end }}
        {{- if include "stillhouse.hasAccess" .root }}
        - name: access
          mountPath: /etc/stillhouse/access
          readOnly: true
        {{- end }}
  volumes:
    - name: models
      {{- if $teacher.model.claim }}
      persistentVolumeClaim:
        claimName: {{ $teacher.model.claim | quote }}
        readOnly: true
      {{- else if or $values.modelCache.claim $values.modelCache.size }}
      persistentVolumeClaim:
        claimName: {{ $values.modelCache.claim | default (printf "%s-models" .root.Release.Name) | quote }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $teacher.sharedMemory | quote }}
    # Optional, so that a missing one is said by the program, in its log and its metrics, and not by a pod that waits.
    {{- if $values.tls.secret }}
    - name: tls
      secret:
        secretName: {{ $values.tls.secret | quote }}
        optional: true
        defaultMode: 0440
    {{- end }}
    {{- if and $teacher.model.repository $teacher.tokenSecret }}
    - name: hub
      secret:
        secretName: {{ $teacher.tokenSecret | quote }}
        optional: true
        defaultMode: 0440
    {{- end }}
    {{- if $values.access.secret }}
    - name: access
      secret:
        secretName: {{ $values.access.secret | quote }}
        optional: true
        defaultMode: 0440
    {{- else if $values.access.tenants }}
    - name: access
      configMap:
        name: {{ .root.Release.Name }}-tenants
    {{- end }}
{{- end }}

{{- define "stillhouse.teacherArgs" -}}
{{- $values := .root.Values -}}
{{- $teacher := .teacher -}}
- {{ printf "--model=%s" (include "stillhouse.modelPath" $teacher) | quote }}
- --name={{ .name }}
- --engine={{ $teacher.engine }}
- --listen={{ $values.listenAddress }}:50051
- --metrics-port=9464
- --health-listen={{ $values.listenAddress }}:8080
- --drain-s={{ $teacher.drainSeconds | int }}
- --stall-s={{ $teacher.stallSeconds | int }}
- --hold-failed-s={{ $teacher.holdFailedSeconds | int }}
- --log-format=json
{{- if $teacher.revision }}
- --expect-revision={{ $teacher.revision }}
{{- end }}
{{- if and (eq $teacher.engine "vllm") (not (hasKey $teacher.options "tensor-parallel-size")) }}
- --tensor-parallel-size={{ $teacher.gpus | int }}
{{- end }}
{{- if gt (int $teacher.nodes) 1 }}
{{- if not (hasKey $teacher.options "pipeline-parallel-size") }}
- --pipeline-parallel-size={{ $teacher.nodes | int }}
{{- end }}
- --nodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --leader-address=$(LWS_LEADER_ADDRESS)
- --nodes-wait-s={{ $teacher.loadSeconds | int }}
{{- end }}
{{- if $values.tls.secret }}
- --tls-certificate=/etc/stillhouse/tls/tls.crt
- --tls-key=/etc/stillhouse/tls/tls.key
{{- if $values.tls.clientCertificates }}
- --tls-client-ca=/etc/stillhouse/tls/ca.crt
{{- end }}
{{- end }}
{{- if include "stillhouse.hasAccess" .root }}
- --access=/etc/stillhouse/access/tenants.yaml
{{- if $values.access.plaintextTokens }}
- --plaintext-tokens
{{- end }}
{{- if $values.access.tokenReview }}
- --token-review
- {{ printf "--token-audience=%s" $values.access.audience | quote }}
{{- end }}
{{- end }}
{{- range $name, $value := $teacher.options }}
{{- with include "stillhouse.option" (dict "name" $name "value" $value) }}
- {{ . }}
{{- end }}
{{- end }}
{{- end }}
