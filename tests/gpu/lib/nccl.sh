# Ranks on this machine's GPUs (sourced).

# How many GPUs a process sees.
num_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
    else
        nvidia-smi -L 2>/dev/null | wc -l
    fi
}

# as_host COMMAND...: to NCCL, which takes no two ranks of a host on one GPU, a rank of a host of its own
as_host() {
    NCCL_HOSTID=host${OMPI_COMM_WORLD_RANK:-$PMI_RANK} exec "$@"
}
export -f as_host

# launch_over_nccl MPIEXEC NUM_RANKS COMMAND...: a GPU each, or, with more ranks than GPUs, shared, over sockets. Killed
# after LAUNCH_SECONDS (100). NVLink's multicast stays off: it is no part of what is tested.
launch_over_nccl() {
    local mpiexec=$1 ranks=$2
    shift 2
    if [ "$ranks" -gt "$(num_gpus)" ]; then
        NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2 \
            timeout -k 5 "${LAUNCH_SECONDS:-100}" "$mpiexec" -n "$ranks" bash -c 'as_host "$@"' as_host "$@"
    else
        NCCL_NVLS_ENABLE=0 timeout -k 5 "${LAUNCH_SECONDS:-100}" "$mpiexec" -n "$ranks" "$@"
    fi
}
