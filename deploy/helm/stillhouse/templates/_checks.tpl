{{/* Fails unless the value, where it is a string that is not empty, matches: {path, value, pattern, fix}. */}}
{{- define "stillhouse.mustMatch" -}}
{{- if kindIs "string" .value -}}{{/* `and` would look at all of them in Helm 3 */}}
{{- if not (regexMatch (printf "^$|%s" .pattern) .value) -}}
{{- fail (printf "%s: %q %s" .path .value .fix) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What teachers and runs have in common: {path, of}. */}}
{{- define "stillhouse.mustBeWritten" -}}
{{- $path := .path -}}
{{- $of := .of -}}
{{- range $key := list "cpu" "memory" "sharedMemory" -}}
{{- include "stillhouse.mustMatch" (dict "path" (printf "%s.%s" $path $key) "value" (index $of $key) "pattern" "^[0-9]+([.][0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$" "fix" "is not a quantity; give a number with m, k, M, G, T, Ki, Mi, Gi or Ti, for example 64Gi") -}}
{{- if not (index $of $key) -}}
{{- fail (printf "%s.%s: is empty; give a quantity, for example 64Gi" $path $key) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "tokenSecret" "tlsSecret" "priorityClassName" "serviceAccountName" "queue" "runsClaim" "modelsClaim" -}}
{{- include "stillhouse.mustBeName" (dict "path" (printf "%s.%s" $path $key) "value" (index $of $key)) -}}
{{- end -}}
{{- include "stillhouse.mustMatch" (dict "path" (printf "%s.gpuResource" $path) "value" $of.gpuResource "pattern" "^[a-z0-9.-]+/[A-Za-z0-9._-]+$" "fix" "is not a resource; give its full name, for example nvidia.com/gpu") -}}
{{- range $key, $_ := $of.env -}}
{{- include "stillhouse.mustMatch" (dict "path" (printf "%s.env" $path) "value" $key "pattern" "^[A-Za-z_][A-Za-z0-9_]*$" "fix" "is not the name of a variable; give letters, digits and _") -}}
{{- end -}}
{{- end }}

{{/* Of an object that is there already: {path, value}. */}}
{{- define "stillhouse.mustBeName" -}}
{{- include "stillhouse.mustMatch" (dict "path" .path "value" .value "pattern" "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$" "fix" "is not a name; give that of an object of the namespace: lower case letters, digits, - and .") -}}
{{- end }}

{{/* What a teacher or a run is called becomes part of host names and labels: {path, value}. */}}
{{- define "stillhouse.mustBeLabel" -}}
{{- include "stillhouse.mustMatch" (dict "path" .path "value" .value "pattern" "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" "fix" "is not a name; give lower case letters, digits and -") -}}
{{- end }}
