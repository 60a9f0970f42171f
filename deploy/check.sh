#!/usr/bin/env bash
# Checks what can be proven of this folder without a cluster: `make check-deploy`, a part of `make test`.
#   check.sh            checks; a tool that cannot be had is named and skipped, unless TAPIO_REQUIRE=all
#   check.sh --update   writes what is derived: the copies in overlays/base, and the checksums of configurations
# Tools are put under target/tools by check/tools.sh.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TARGET=${CARGO_TARGET_DIR:-$HERE/../target}
mkdir -p "$TARGET/tools"
TOOLS=$(cd "$TARGET/tools" && pwd)
cd "$HERE"
. check/tools.sh
passed=0 skipped=0
check() { # what, command...
  local what=$1
  shift
  if ! "$@" >"$WORK/out" 2>&1; then
    cat "$WORK/out" >&2
    echo "deploy: FAILED: $what" >&2
    exit 1
  fi
  passed=$((passed + 1))
  echo "deploy: ok: $what"
}
skip() { # what, why
  if [ "${TAPIO_REQUIRE:-}" = all ]; then
    echo "deploy: FAILED: $1: $2" >&2
    exit 1
  fi
  skipped=$((skipped + 1))
  echo "deploy: SKIPPED: $1: $2" >&2
}
WORK=$(mktemp -d "$TOOLS/check.XXXXXX")
trap 'rm -rf "$WORK"' EXIT

# kustomize reads no file above a kustomization, and refuses `../..` from an overlay as a cycle: the overlays lie inside the folder
# that they would build upon. The quick start wants plain files here. So overlays/base has copies.
COPIES=(namespace.yaml server-deployment.yaml collector-daemonset.yaml scaling.yaml network-policies.yaml)
find_python_tools || VENV=
if [ "${1:-}" = --update ]; then
  [ -n "$VENV" ] || { echo "python3 with venv and pip is needed" >&2; exit 1; }
  "$VENV/bin/python" check/manifests.py checksums --update server-deployment.yaml collector-daemonset.yaml
  cp "${COPIES[@]}" overlays/base/
  exit
fi
same_copies() {
  local file
  for file in "${COPIES[@]}"; do
    cmp "$file" "overlays/base/$file" || { echo "run deploy/check.sh --update"; return 1; }
  done
  # The same list, whatever the comments above it say.
  diff <(sed -n '/^resources/,$p' kustomization.yaml) <(sed -n '/^resources/,$p' overlays/base/kustomization.yaml)
}
check "overlays/base has the same files as this folder" same_copies

# The stages whose build the head of the Dockerfile describes; and no build reads what it does not need.
image_files() {
  local stage
  for stage in server collector sbom; do
    grep -qE "^FROM .* AS $stage\$" Dockerfile || { echo "Dockerfile: no stage $stage"; return 1; }
    grep -q -- "--target $stage" Dockerfile || { echo "Dockerfile: its head does not say how to build $stage"; return 1; }
  done
  for name in .git target; do
    grep -qx "$name" ../.dockerignore || { echo ".dockerignore: $name is missing"; return 1; }
  done
}
check "the Dockerfile has its stages" image_files

rendered=()
if find_kubectl; then
  render() { # folder, name
    "$KUBECTL" kustomize "$1" >"$WORK/$2.yaml"
    [ -s "$WORK/$2.yaml" ]
  }
  # A component on top of default and production, as an operator's own kustomization would have it.
  with_component() { # component
    local base
    for base in ../.. ../../overlays/production; do
      # Inside of this folder's parent, since kustomize wants relative paths.
      mkdir -p "$WORK/component"
      printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [%s]\ncomponents: [%s]\n' \
        "$(realpath --relative-to="$WORK/component" "components/$1/$base")" \
        "$(realpath --relative-to="$WORK/component" "components/$1")" >"$WORK/component/kustomization.yaml"
      render "$WORK/component" "$1-$(basename "$base" | tr -d .)"
    done
  }
  check "kubectl kustomize deploy/" render . default
  rendered+=("$WORK/default.yaml")
  for overlay in kind production; do
    check "kubectl kustomize deploy/overlays/$overlay" render "overlays/$overlay" "$overlay"
    rendered+=("$WORK/$overlay.yaml")
  done
  for component in components/*/; do
    component=$(basename "$component")
    check "kubectl kustomize with components/$component" with_component "$component"
    rendered+=("$WORK/$component-.yaml" "$WORK/$component-production.yaml")
  done
  check "kubectl kustomize deploy/monitoring" render monitoring monitoring
else
  skip kustomize "kubectl is missing, and the wheel that holds one cannot be had"
fi

if [ -n "$VENV" ]; then
  python() { "$VENV/bin/python" check/manifests.py "$@"; }
  check "checksums of the configurations" python checksums server-deployment.yaml collector-daemonset.yaml
  check yamllint "$VENV/bin/yamllint" --strict -c .yamllint.yaml .
  check "hadolint Dockerfile" "$VENV/bin/hadolint" Dockerfile
  # The oldest and newest that the tool knows, and some between.
  for version in 1.25.0 1.29.0 1.33.0 1.37.0; do
    check "kubernetes-validate --strict for Kubernetes $version" "$VENV/bin/kubernetes-validate" --strict --quiet -k "$version" \
      namespace.yaml server-deployment.yaml collector-daemonset.yaml "${rendered[@]}"
  done
  if [ ${#rendered[@]} -gt 0 ]; then
    check "images by digest in production" python digests "$WORK/production.yaml"
    security() {
      "$VENV/bin/checkov" --config-file .checkov.yaml -f "$WORK/default.yaml" -f "$WORK/production.yaml" >"$WORK/checkov.json" \
        && python findings check/checkov-exceptions.yaml "$WORK/checkov.json"
    }
    check "checkov, but for check/checkov-exceptions.yaml" security
  fi
else
  skip "yamllint, hadolint, kubernetes-validate, checkov" "python3 with venv and pip, and check/requirements.txt, cannot be had"
fi

if [ -n "$VENV" ] && find_prometheus; then
  rules() {
    python rules monitoring/prometheus-rule.yaml >"$WORK/rules.yaml"
    cp monitoring/tests/*.yaml "$WORK/"
    "$PROMTOOL" check rules --lint-fatal "$WORK/rules.yaml"
  }
  check "promtool check rules" rules
  for test in monitoring/tests/*.yaml; do
    check "promtool test rules $(basename "$test")" "$PROMTOOL" test rules "$WORK/$(basename "$test")"
  done
else
  skip promtool "it needs Debian's package prometheus or one in PATH, and the Python tools"
fi

if [ -n "$VENV" ] && [ ${#rendered[@]} -gt 0 ] && find_helm; then
  # The chart renders what kustomize does, from values that its schema admits.
  same_as() { # overlay, helm's arguments...
    local overlay=$1
    shift
    "$HELM" template tapio helm/tapio --namespace tapio-system "$@" >"$WORK/helm.yaml" && python same "$WORK/$overlay.yaml" "$WORK/helm.yaml"
  }
  refused() { # what must be said, helm's arguments...
    local said=$1
    shift
    ! "$HELM" template tapio helm/tapio --namespace tapio-system "$@" >"$WORK/helm.yaml" 2>"$WORK/refusal" \
      && grep -q "$said" "$WORK/refusal"
  }
  check "helm lint" "$HELM" lint --strict --quiet helm/tapio
  check "the chart renders the default manifests" same_as default
  check "the chart renders the production overlay" same_as production -f helm/production.yaml
  check "the chart renders components/scale-on-lag" same_as scale-on-lag- --set server.autoscaling.lag=50m
  check "the chart renders components/linux-before-5.11" same_as linux-before-5.11- --set 'collector.extraCapabilities={SYS_RESOURCE}'
  check "the chart renders components/secret-metadata" same_as secret-metadata- --set collector.secretMetadata=true
  check "the chart renders components/log-lines" same_as log-lines- --set collector.logs=true
  check "the chart renders components/uring" same_as uring-production -f helm/production.yaml \
    --set server.seccompProfile.type=Localhost --set server.seccompProfile.localhostProfile=tapio/tapio-server.json
  check "the chart renders components/without-nats" same_as without-nats- --set nats.enabled=false
  check "the chart renders components/own-nats" same_as own-nats- --set nats.url=nats://tapio-nats:4222
  check "the chart's schema refuses a misspelled value" refused tlsSecrets --set server.tlsSecrets=x
  check "the chart's schema refuses a wrong digest" refused digest --set server.image.digest=sha256:1
else
  skip helm "it needs helm or the wheel that holds one, kubectl, and the Python tools"
fi
echo "deploy: $passed passed, $skipped skipped"
