{{/* The one name of all objects: <release>-finetune-operator, or <release> where that says it already. */}}
{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Cluster-wide objects carry the namespace too: two releases of one name must not share a ClusterRole. */}}
{{- define "finetune-operator.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "finetune-operator.fullname" .) -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "finetune-operator.fullname" .) -}}
{{- end -}}

{{- define "finetune-operator.tlsSecret" -}}
{{- include "finetune-operator.fullname" . }}-progress-tls
{{- end -}}

{{/* The Secret that cert-manager fills; not the one of the operator's own CA, so that one can change from one to the other. */}}
{{- define "finetune-operator.certSecret" -}}
{{- include "finetune-operator.fullname" . }}-progress-cert
{{- end -}}

{{- define "finetune-operator.image" -}}
{{- .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "finetune-operator.trainerImage" -}}
{{- .Values.jobDefaults.image | default (printf "finetune-trainer:%s" .Chart.AppVersion) -}}
{{- end -}}

{{/* jobDefaults without what has a flag of its own and what is empty; "$(" would be expanded by the kubelet. */}}
{{- define "finetune-operator.jobDefaults" -}}
{{- $given := dict -}}
{{- range $key, $value := omit .Values.jobDefaults "image" "modelMirror" "datasetMirror" -}}
{{- if $value }}{{ $_ := set $given $key $value }}{{ end -}}
{{- end -}}
{{- if $given }}{{ $given | toJson | replace "$(" "$$(" }}{{ end -}}
{{- end -}}

{{/* Where the Secret of cert-manager is mounted. */}}
{{- define "finetune-operator.tlsDir" -}}/etc/finetune-operator/tls{{- end -}}

{{/* The subject of every binding. */}}
{{- define "finetune-operator.subjects" -}}
- kind: ServiceAccount
  name: {{ include "finetune-operator.serviceAccountName" . }}
  namespace: {{ .Release.Namespace | quote }}
{{- end -}}

{{/* What the operator does in the namespaces of jobs. Each verb has its reason in finetune_operator/kube/permissions.py; a test
compares the two. */}}
{{- define "finetune-operator.jobRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, create, patch]
- apiGroups: [finetune.dev]
  resources: [hyperparametersweeps]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status, hyperparametersweeps/status]
  verbs: [patch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers, hyperparametersweeps/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}

{{/* What it does in no namespace at all. */}}
{{- define "finetune-operator.clusterRules" -}}
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  resourceNames: [finetunejobs.finetune.dev, hyperparametersweeps.finetune.dev]
  verbs: [get]
{{- end -}}
