# Sourced by the other scripts. Each setting may be given in the environment.
: "${CLUSTER_DIR:=${TMPDIR:-/tmp}/slurm-cluster}" # configuration, logs, state and sockets
: "${CLUSTER_NODES:=3}"                           # compute nodes n1, n2, ...
: "${CLUSTER_CPUS:=16}" "${CLUSTER_MB:=64000}"    # what each node claims to have
export PATH=$PATH:/usr/sbin:/sbin                 # where Slurm's daemons are; not in every PATH
export CLUSTER_DIR CLUSTER_NODES CLUSTER_CPUS CLUSTER_MB SLURM_CONF=$CLUSTER_DIR/slurm.conf
NET=10.77.0                                       # exists only in the cluster's own namespaces
HOSTS="ctl $(seq -s ' ' -f 'n%g' "$CLUSTER_NODES")"
HERE=$(dirname "$(readlink -f "$0")")

alive() { [ -s "$CLUSTER_DIR/$1.pid" ] && grep -qsa "$HERE/host" "/proc/$(cat "$CLUSTER_DIR/$1.pid")/cmdline"; }

# Start a host with its own network, name, mounts and processes; all end with its process 1.
boot() {
  local child
  setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$HERE/host" "$1" \
    </dev/null >>"$CLUSTER_DIR/log/$1.log" 2>&1 &
  until child=$(pgrep -P $!); do
    kill -0 $! 2>/dev/null || { echo "no namespaces: $(tail -n 1 "$CLUSTER_DIR/log/$1.log")" >&2; return 1; }
    sleep 0.02
  done
  echo "$child" >"$CLUSTER_DIR/$1.pid"
}

in_network() { local host=$1; shift; nsenter -t "$(cat "$CLUSTER_DIR/$host.pid")" -n ip "$@"; }

# Connect a node to the controller's bridge: eth0 on the node, an interface of the node's name on ctl.
connect() {
  in_network ctl link add "$1" type veth peer name eth0 netns "$(cat "$CLUSTER_DIR/$1.pid")"
  in_network ctl link set "$1" master bridge up
  in_network "$1" address add "$NET.$((10 + ${1#n}))/24" dev eth0
  in_network "$1" link set eth0 up
  in_network "$1" link set lo up
}
