#!/usr/bin/env bash
# The lab's storage: a default class without a provisioner, and volumes made in advance, which are folders of this machine. A
# claim takes one of them; what was in it stays when the claim is gone, until this script empties it and offers it again.
set -euo pipefail
KUBE=${TAPIO_KUBE:-/tmp/kube}
VOLUMES=40
kubectl_() { nsenter --net=/run/netns/kube kubectl --kubeconfig "$KUBE/admin.conf" "$@"; }

# Of those in use nothing is touched.
kubectl_ get persistentvolumes -o jsonpath='{range .items[?(@.status.phase=="Released")]}{.metadata.name}{"\n"}{end}' |
  while read -r released; do
    kubectl_ delete --wait=true persistentvolume "$released" >/dev/null
    rm -rf "$KUBE/volumes/${released#lab-}"
  done
{
  cat <<END
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: lab, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
reclaimPolicy: Retain
END
  for number in $(seq $VOLUMES); do
    mkdir -p "$KUBE/volumes/$number"
    cat <<END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: lab-$number}
spec:
  storageClassName: lab
  capacity: {storage: 4Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  local: {path: "$KUBE/volumes/$number"}
  nodeAffinity:
    required:
      nodeSelectorTerms:
        - matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]
END
  done
} | kubectl_ apply -f - >/dev/null
