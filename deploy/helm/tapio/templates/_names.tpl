{{- define "tapio.selector" -}}
app.kubernetes.io/component: {{ . }}
app.kubernetes.io/part-of: tapio
{{- end }}

{{- define "tapio.labels" -}}
app.kubernetes.io/name: tapio-{{ . }}
{{ include "tapio.selector" . }}
{{- end }}

{{- define "tapio.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}

{{- /* Of a mode, since only who reads as root needs no group. */}}
{{- define "tapio.kubeApiToken" -}}
projected:
  defaultMode: {{ . }}
  sources:
    - serviceAccountToken: {path: token, expirationSeconds: 3600}
    - configMap:
        name: kube-root-ca.crt
        items: [{key: ca.crt, path: ca.crt}]
    - downwardAPI:
        items:
          - path: namespace
            fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}
{{- end }}

{{- define "tapio.serverToken" -}}
projected:
  defaultMode: {{ . }}
  sources:
    - serviceAccountToken: {path: token, audience: tapio-server, expirationSeconds: 3600}
{{- end }}

{{- /* Empty where the servers share no log. */}}
{{- define "tapio.natsUrl" -}}
{{- if .Values.nats.url }}{{ .Values.nats.url }}
{{- else if .Values.nats.enabled }}
{{- if .Values.nats.tlsSecret }}tls://tapio-nats.{{ .Release.Namespace }}.svc:4222{{ else }}nats://tapio-nats:4222{{ end }}
{{- end }}
{{- end }}
