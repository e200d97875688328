/* The collectives between real GPUs: over NCCL where every rank has one of its own, else through
 * the host's memory. Where there is no GPU nothing is checked. ranks: 2 */
#include "device_collectives.h"

#include "comm/comm_nccl.h"
#include "device/device_select.h"

static struct arena *device_arena;

static struct tensor device_copy(const struct tensor *host)
{
    struct tensor x = tensor_allocate(device_arena, host->dtype, host->dim, host->num_dims);

    stream_copy_from_host(device_stream, x.data, host->data, tensor_size_bytes(host));
    return x;
}

static void device_read(const struct tensor *device, struct tensor *host)
{
    stream_copy_to_host(device_stream, host->data, device->data, tensor_size_bytes(host));
}

static void device_release(void)
{
    stream_wait(device_stream);
    arena_release(device_arena, (struct arena_mark){0});
}

static void device_wait(struct comm_handle handle)
{
    comm_wait(handle, device_stream);
    stream_wait(device_stream);
}

int main(int argc, char **argv)
{
    const struct device *device;

    dist_begin(argc, argv);
    device = device_select("auto", launch_local_rank());
    if (device->kind != DEVICE_CUDA) {
        puts("no GPU: skipped");
        return dist_end();
    }
    comm_nccl_choose(device);
    if (launch_rank() == 0) {
        printf("%d ranks over %s\n", launch_size(), comm_nccl_is_chosen() ? "NCCL" : "MPI");
    }
    device_arena = arena_create("device", &device->memory);
    run_device_collectives(device, 1000003);
    arena_destroy(device_arena);
    return dist_end();
}
