{{- define "lorax.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "lorax.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "lorax.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lorax.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What finds the pods; it can never change in a release. */}}
{{- define "lorax.selector" -}}
app.kubernetes.io/name: {{ include "lorax.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* The pod of helm test, which no Service and no policy of the server's may take for one of its own. */}}
{{- define "lorax.testSelector" -}}
app.kubernetes.io/name: {{ include "lorax.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "lorax.labels" -}}
{{ include "lorax.selector" . }}
{{ include "lorax.release" . }}
{{- end -}}

{{/* The gateway's pods have a name of their own, so that nothing takes them for replicas. */}}
{{- define "lorax.gateway.selector" -}}
app.kubernetes.io/name: {{ include "lorax.name" . }}-gateway
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "lorax.gateway.labels" -}}
{{ include "lorax.gateway.selector" . }}
app.kubernetes.io/component: gateway
{{ include "lorax.release" . }}
{{- end -}}

{{- define "lorax.release" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The beginning of every object's metadata. */}}
{{- define "lorax.metadata" -}}
name: {{ include "lorax.fullname" . | quote }}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "lorax.labels" . | nindent 2 }}
{{- end -}}

{{- define "lorax.image" -}}
{{ include "lorax.imageOf" (merge (dict "tag" (default .Chart.AppVersion .Values.image.tag)) .Values.image) }}
{{- end -}}

{{- define "lorax.imageOf" -}}
{{ .repository }}{{ ternary (printf "@%s" .digest) (printf ":%s" .tag) (ne .digest "") }}
{{- end -}}

{{- define "lorax.serviceAccount" -}}
{{ default (include "lorax.fullname" .) .Values.serviceAccount.name }}
{{- end -}}

{{/* The Pod Security Standard "restricted", and a root that nobody writes to. */}}
{{- define "lorax.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lorax.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
