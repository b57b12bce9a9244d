{{/* The server's flags. Not LORAX_* variables: a flag that does not exist stops the server. */}}
{{- define "lorax.arguments" -}}
{{- $v := .Values -}}
{{- $flags := dict
  "model" $v.model
  "log-level" $v.logLevel
  "device" (ternary "cuda" "cpu" (gt (int $v.gpu.count) 0))
  "port" 50051
  "metrics-port" 9090
  "drain-seconds" $v.drainSeconds
-}}
{{- with $v.adapters -}}
{{- if .manifest -}}{{- $_ := set $flags "manifest" "/etc/lorax/adapters/adapters.yaml" -}}{{- end -}}
{{- if .manifestUri -}}{{- $_ := set $flags "manifest" .manifestUri -}}{{- end -}}
{{- if .source -}}{{- $_ := set $flags "source" .source -}}{{- end -}}
{{- if .existingClaim -}}{{- $_ := set $flags "adapters" "/adapters" -}}{{- end -}}
{{- if .loadOnDemand -}}{{- $_ := set $flags "load-on-demand" "on" -}}{{- end -}}
{{- end -}}
{{- if ne $v.state.kind "none" -}}
{{- $_ := set $flags "state" "/state/lorax" -}}
{{- $_ := set $flags "watch-seconds" $v.adapters.watchSeconds -}}
{{- end -}}
{{- if and $v.gateway.enabled (not (hasKey $v.settings "linger-seconds")) -}}
{{- $_ := set $flags "linger-seconds" 2 -}}{{/* four health checks of the gateway */}}
{{- end -}}
{{- range $name, $value := $v.settings -}}
{{- if hasKey $flags $name -}}{{- fail (printf "settings.%s: the chart sets this flag from a value of its own" $name) -}}{{- end -}}
{{- $_ := set $flags $name $value -}}
{{- end -}}
{{- range $name, $value := $flags }}
- {{ printf "--%s=%s" $name (include "lorax.text" $value) | quote }}
{{- end -}}
{{- end -}}

{{/* A value as a flag takes it: on and off, and large numbers in full. */}}
{{- define "lorax.text" -}}
{{- if kindIs "bool" . -}}{{ ternary "on" "off" . }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}
{{- else -}}{{ . }}
{{- end -}}
{{- end -}}
