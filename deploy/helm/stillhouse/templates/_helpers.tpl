{{/* Names. Every object of a teacher or a run is called RELEASE-NAME. */}}
{{- define "stillhouse.name" -}}
{{- printf "%s-%s" .root.Release.Name .name -}}
{{- end }}

{{/* What runs a teacher. A LeaderWorkerSet may not be called as its Service: its controller makes one by its own name. */}}
{{- define "stillhouse.workload" -}}
{{- include "stillhouse.name" . -}}{{- if gt (int .teacher.nodes) 1 }}-group{{ end -}}
{{- end }}

{{- define "stillhouse.labels" -}}
app.kubernetes.io/name: stillhouse
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What selects the pods of one teacher or run: {root, component, name}. */}}
{{- define "stillhouse.selector" -}}
app.kubernetes.io/name: stillhouse
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
stillhouse.dev/{{ .component }}: {{ .name | quote }}
{{- end }}

{{- define "stillhouse.objectLabels" -}}
{{ include "stillhouse.labels" .root }}
app.kubernetes.io/component: {{ .component }}
stillhouse.dev/{{ .component }}: {{ .name | quote }}
{{- end }}

{{- define "stillhouse.podLabels" -}}
{{ include "stillhouse.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* A teacher with its defaults, as YAML. A key that is null in `teachers` has its default too. */}}
{{- define "stillhouse.teacher" -}}
{{- $own := dict -}}
{{- range $key, $value := .teacher }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $own $key $value }}{{ end }}{{ end -}}
{{- $teacher := mergeOverwrite (deepCopy .root.Values.teacherDefaults) $own -}}
{{- $_ := set $teacher "engine" ($teacher.engine | default (ternary "torch" "vllm" (eq (int $teacher.gpus) 0))) -}}
{{- $_ := set $teacher "model" ($teacher.model | default dict) -}}
{{- toYaml $teacher -}}
{{- end }}

{{- define "stillhouse.run" -}}
{{- $own := dict -}}
{{- range $key, $value := .run }}{{ if not (kindIs "invalid" $value) }}{{ $_ := set $own $key $value }}{{ end }}{{ end -}}
{{- mergeOverwrite (deepCopy .root.Values.runDefaults) $own | toYaml -}}
{{- end }}

{{/* Of the whole cluster, as are the rights of token reviews: the namespace belongs to their names. */}}
{{- define "stillhouse.priorityClass" -}}
{{- printf "%s.%s-teacher" .Release.Namespace .Release.Name -}}
{{- end }}

{{/* {root, full: a whole reference or "", name} */}}
{{- define "stillhouse.image" -}}
{{- $images := .root.Values.images -}}
{{- .full | default (printf "%s/%s:%s" $images.registry .name ($images.tag | default .root.Chart.AppVersion)) -}}
{{- end }}

{{- define "stillhouse.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* {gpus, gpuResource, cpu, memory}. No CPU limit: throttling would make latency without saving anything. */}}
{{- define "stillhouse.resources" -}}
resources:
  requests:
    cpu: {{ .cpu | quote }}
    memory: {{ .memory | quote }}
  limits:
    memory: {{ .memory | quote }}
    {{- if .gpus }}
    {{ .gpuResource }}: {{ .gpus | int }}
    {{- end }}
{{- end }}

{{/* What the pods of teachers and runs share: {root, of: the teacher or run}. */}}
{{- define "stillhouse.podBasics" -}}
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with .root.Values.runAsUser }}
  runAsUser: {{ . | int64 }}
  runAsGroup: {{ . | int64 }}
  fsGroup: {{ . | int64 }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with .of.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* {fixed and own}: environment variables as a list; own ones win. */}}
{{- define "stillhouse.env" -}}
{{- $all := deepCopy .fixed -}}
{{- range $name, $value := .own }}{{ $_ := set $all $name $value }}{{ end -}}{{/* not merge: 0 and "" count */}}
{{- range $name, $value := $all }}
- name: {{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}

{{- define "stillhouse.hasAccess" -}}
{{- if or .Values.access.tenants .Values.access.secret }}yes{{ end -}}
{{- end }}

{{/* Where a teacher's weights are, in its pods. */}}
{{- define "stillhouse.modelPath" -}}
{{- if .model.repository -}}
/models/{{ .model.repository }}/{{ .model.commit }}
{{- else -}}
/models/{{ .model.path | default "" | trimPrefix "/" }}
{{- end -}}
{{- end }}

{{/* An option of the command line: {name, value}. */}}
{{- define "stillhouse.option" -}}
{{- if kindIs "bool" .value -}}
{{- if .value }}{{ printf "--%s" .name | quote }}{{ end -}}
{{- else if kindIs "string" .value -}}
{{ printf "--%s=%s" .name .value | quote }}
{{- else -}}
{{ printf "--%s=%s" .name (toJson .value) | quote }}
{{- end -}}
{{- end }}
