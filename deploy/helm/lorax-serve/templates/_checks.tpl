{{/* What values.schema.json cannot say: how values go together. */}}
{{- define "lorax.checks" -}}
{{- $v := .Values -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "lorax.fullname" .)) -}}
{{- fail (printf "%s names Services, and so must begin with a letter and have no dots: set fullnameOverride" (include "lorax.fullname" .)) -}}
{{- end -}}
{{- $end := include "lorax.endSeconds" . | int -}}
{{- if and $v.terminationGraceSeconds (le (int $v.terminationGraceSeconds) (int $end)) -}}
{{- fail (printf "terminationGraceSeconds (%d) must be more than preStopSeconds and the longer of drainSeconds and settings.linger-seconds (%d): running requests would be cut off" (int $v.terminationGraceSeconds) (int $end)) -}}
{{- end -}}
{{- if and $v.adapters.manifest $v.adapters.manifestUri -}}
{{- fail "adapters.manifest and adapters.manifestUri exclude each other: one list says what is served" -}}
{{- end -}}
{{- $manifest := or $v.adapters.manifest $v.adapters.manifestUri -}}
{{- if and $v.adapters.source (or $manifest $v.adapters.existingClaim) -}}
{{- fail "adapters.source excludes adapters.manifest, manifestUri and existingClaim: a server has one word on what it serves" -}}
{{- end -}}
{{- if and $v.adapters.loadOnDemand $manifest -}}
{{- fail "adapters.loadOnDemand excludes adapters.manifest and manifestUri, which decide alone what is served" -}}
{{- end -}}
{{- if and (eq $v.state.kind "none") (or $manifest $v.adapters.source $v.adapters.loadOnDemand) -}}
{{- fail "state.kind none reads adapters where they are: adapters.manifest, manifestUri, source and loadOnDemand need another" -}}
{{- end -}}
{{- if and $v.adapters.loadOnDemand (not $v.adapters.source) (not $v.adapters.existingClaim) -}}
{{- fail "adapters.loadOnDemand needs adapters.source or adapters.existingClaim to load from" -}}
{{- end -}}
{{- if eq $v.state.kind "existingClaim" -}}
{{- if not $v.state.existingClaim -}}{{- fail "state.existingClaim: name the claim" -}}{{- end -}}
{{- if or (ne (int $v.replicas) 1) (ne $v.autoscaling.kind "none") -}}
{{- fail "state.kind existingClaim: one server uses a state directory at a time; set replicas: 1 and autoscaling.kind: none" -}}
{{- end -}}
{{- end -}}
{{- if and $v.monitoring.rules.enabled (not (contains "lorax" (include "lorax.fullname" .))) -}}
{{- fail (printf "monitoring.rules find replicas by lorax in the name of the headless Service, which %s lacks: change fullnameOverride, or leave monitoring.rules.enabled false" (include "lorax.fullname" .)) -}}
{{- end -}}
{{- if and $v.gateway.tls.requireClientCertificates (not $v.gateway.tls.secret) -}}
{{- fail "gateway.tls.requireClientCertificates needs gateway.tls.secret: the roots that sign them are its ca.crt" -}}
{{- end -}}
{{- $front := ternary "gateway.service" "service" $v.gateway.enabled -}}
{{- $service := ternary $v.gateway.service $v.service $v.gateway.enabled -}}
{{- if and $v.networkPolicy.enabled (ne $service.type "ClusterIP") -}}
{{- $blocks := false -}}
{{- range $v.networkPolicy.clients -}}{{- if hasKey . "ipBlock" -}}{{- $blocks = true -}}{{- end -}}{{- end -}}
{{- if not $blocks -}}
{{- fail (printf "%s.type %s: calls come from addresses of nodes or of outside, which no selector matches: let them in by an ipBlock in networkPolicy.clients" $front $service.type) -}}
{{- end -}}
{{- end -}}
{{- if ne $v.autoscaling.kind "none" -}}
{{- if lt (int $v.autoscaling.scaleDownSeconds) (int $v.drainSeconds) -}}
{{- fail "autoscaling.scaleDownSeconds must be at least drainSeconds: pods would be taken away faster than they drain" -}}
{{- end -}}
{{- if lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas) -}}
{{- fail "autoscaling.maxReplicas is less than minReplicas" -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.autoscaling.prometheus) -}}
{{- fail "autoscaling.kind keda: say in autoscaling.prometheus where Prometheus is" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* From the end of a pod's service until the server exits by itself: it closes its port when running
requests are done or cut off, and has lingered. */}}
{{- define "lorax.endSeconds" -}}
{{- add .Values.preStopSeconds (max (int .Values.drainSeconds) (int (ceil (float64 (index .Values.settings "linger-seconds" | default 0))))) -}}
{{- end -}}
