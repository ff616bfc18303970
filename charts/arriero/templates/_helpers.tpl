{{/* Name of the operator's objects. The Lease and the manifests without Helm have it, too. */}}
{{- define "arriero.name" -}}
arriero-operator
{{- end }}

{{/* Of what has no namespace: another release beside this one serves other namespaces. */}}
{{- define "arriero.clusterName" -}}
arriero-operator-{{ .Release.Namespace }}
{{- end }}

{{- define "arriero.selector" -}}
app.kubernetes.io/name: arriero
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "arriero.common" -}}
app.kubernetes.io/name: arriero
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "arriero.labels" -}}
{{ include "arriero.common" . }}
app.kubernetes.io/component: operator
{{- end }}

{{/* One image's reference: dict "root" $ "image" <one of .Values.images>. */}}
{{- define "arriero.image" -}}
{{- $images := .root.Values.images -}}
{{- with $images.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default $images.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "arriero.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "arriero.name" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{/* What Pod Security `restricted` asks of a pod and of each of its containers, and more. */}}
{{- define "arriero.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "arriero.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
