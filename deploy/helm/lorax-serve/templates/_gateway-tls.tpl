{{/* What ends TLS in Envoy's listener. */}}
{{- define "lorax.gateway.transportSocket" -}}
{{- $mutual := .Values.gateway.tls.requireClientCertificates -}}
transport_socket:
  name: envoy.transport_sockets.tls
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
    {{- if $mutual }}
    require_client_certificate: true
    {{- end }}
    common_tls_context:
      alpn_protocols: [h2]
      tls_params: { tls_minimum_protocol_version: TLSv1_2 }
      tls_certificate_sds_secret_configs:
        - name: server
          sds_config:
            path_config_source: { path: /etc/lorax/gateway/tls-server.yaml }
      {{- if $mutual }}
      validation_context_sds_secret_config:
        name: clients
        sds_config:
          path_config_source: { path: /etc/lorax/gateway/tls-clients.yaml }
      {{- end }}
{{- end -}}

{{/* Files for Envoy, by name. It reads again only what it has by SDS, where a file has one secret. The
kubelet replaces a Secret's files by renaming a link beside them, at which Envoy reads them, as of one
moment: new connections have the new certificate, and the others go on. */}}
{{- define "lorax.gateway.secrets" -}}
{{- $secret := "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret" -}}
tls-server.yaml: |
  resources:
    - "@type": {{ $secret }}
      name: server
      tls_certificate:
        certificate_chain: { filename: /etc/lorax/tls/tls.crt }
        private_key: { filename: /etc/lorax/tls/tls.key }
        watched_directory: { path: /etc/lorax/tls }
{{- if .Values.gateway.tls.requireClientCertificates }}
tls-clients.yaml: |
  resources:
    - "@type": {{ $secret }}
      name: clients
      validation_context:
        trusted_ca: { filename: /etc/lorax/tls/ca.crt }
        watched_directory: { path: /etc/lorax/tls }
{{- end }}
{{- end -}}
