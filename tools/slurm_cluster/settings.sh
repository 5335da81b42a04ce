# Sourced by the other scripts. Each setting may be given in the environment.
: "${CLUSTER_DIR:=${TMPDIR:-/tmp}/slurm-cluster}" # configuration, logs, state and sockets
: "${CLUSTER_NODES:=3}"                           # compute nodes n1, n2, ...
: "${CLUSTER_CPUS:=16}" "${CLUSTER_MB:=64000}"    # what each node says it has
export CLUSTER_DIR CLUSTER_NODES CLUSTER_CPUS CLUSTER_MB SLURM_CONF=$CLUSTER_DIR/slurm.conf
NET=10.77.0                                       # seen in the cluster's own namespaces alone
HOSTS="ctl $(seq -s ' ' -f 'n%g' "$CLUSTER_NODES")"
HERE=$(dirname "$(readlink -f "$0")")

alive() { [ -s "$CLUSTER_DIR/$1.pid" ] && grep -qsa "$HERE/host" "/proc/$(cat "$CLUSTER_DIR/$1.pid")/cmdline"; }
