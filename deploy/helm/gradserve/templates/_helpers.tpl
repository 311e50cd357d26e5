{{- define "gradserve.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "gradserve.plan" -}}
kubernetes:{{ .Release.Namespace }}/{{ include "gradserve.name" . }}-plan
{{- end }}

{{- define "gradserve.labels" -}}
app.kubernetes.io/name: gradserve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The labels that selectors use; (list . "gateway") */ -}}
{{- define "gradserve.selector" -}}
app.kubernetes.io/name: gradserve
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* What every pod has: no links to Services (their variables look like settings), and the restricted security standard. */ -}}
{{- define "gradserve.pod" -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "gradserve.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* Settings as variables; (list . map) */ -}}
{{- define "gradserve.settings" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- /* Seconds that a pod has for its end: (list MARGIN SETTINGS DEFAULTS); each of the defaults may be among the settings. */ -}}
{{- define "gradserve.grace" -}}
{{- $seconds := float64 (index . 0) }}
{{- $settings := index . 1 }}
{{- range $name, $default := index . 2 }}
{{- $seconds = addf $seconds (float64 (get $settings $name | default $default)) }}
{{- end }}
{{- ceil $seconds | int }}
{{- end }}

{{- /* Over the nodes. Only pods of one revision are counted: with the old ones, an upgrade left both new gateways on one node. */ -}}
{{- define "gradserve.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "gradserve.selector" . | nindent 8 }}
{{- end }}

{{- /*
The number of replicas; (list . "agents" 2), without a number where an autoscaler decides. Then an upgrade writes the number that
runs: Kubernetes scales a Deployment that loses its number to one replica, until the autoscaler has acted.
*/ -}}
{{- define "gradserve.replicas" -}}
{{- $root := index . 0 }}
{{- $live := lookup "apps/v1" "Deployment" $root.Release.Namespace (printf "%s-%s" (include "gradserve.name" $root) (index . 1)) }}
{{- if gt (len .) 2 }}
replicas: {{ index . 2 }}
{{- else if $live }}
replicas: {{ $live.spec.replicas }}
{{- end }}
{{- end }}
