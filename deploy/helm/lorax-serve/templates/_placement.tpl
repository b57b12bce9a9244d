{{/* Where a pod of the image can run, and with which Secrets it is pulled. */}}
{{- define "lorax.placement" -}}
{{- $v := .Values -}}
{{- with $v.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $v.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $v.tolerations $v.gpu.count }}
tolerations:
  {{- if $v.gpu.count }}
  - key: {{ $v.gpu.resource | quote }}
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with $v.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}
