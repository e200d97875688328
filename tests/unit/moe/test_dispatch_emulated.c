/* Emulated expert-parallel ranks (comm_fake.h): however skewed the routing of this rank's tokens,
 * its experts get as many rows as it sends away, as in a job whose ranks are alike. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "comm/comm_fake.h"
#include "moe/dispatcher.h"
#include "ops/ops.h"

enum { EXPERTS = 8, EP = 4, TOKENS = 30, TOPK = 2, HIDDEN = 4, EP_RANK = 1 };

struct job {
    struct groups groups;
    struct stream *stream;
    struct arena *saved, *scratch;
    struct pass pass;
    struct dispatched rows;
};

static void job_start(struct job *job, int etp, int etp_rank)
{
    memset(job, 0, sizeof *job);
    groups_create_self(&job->groups);
    comm_destroy(job->groups.ep);
    comm_destroy(job->groups.etp_ep);
    job->groups.ep = comm_fake_create("ep", EP_RANK, EP);
    job->groups.etp_ep = comm_fake_create("etp-ep", EP_RANK * etp + etp_rank, EP * etp);
    if (etp > 1) {
        comm_destroy(job->groups.etp);
        job->groups.etp = comm_fake_create("etp", etp_rank, etp);
    }
    job->stream = stream_create(device_cpu(), ops_cpu());
    job->saved = arena_create("saved", &device_cpu()->memory);
    job->scratch = arena_create("scratch", &device_cpu()->memory);
    job->pass = (struct pass){.stream = job->stream,
                              .groups = &job->groups,
                              .saved = job->saved,
                              .scratch = job->scratch,
                              .dtype = DTYPE_F32,
                              .training = true};
}

static void job_end(struct job *job)
{
    arena_destroy(job->scratch);
    arena_destroy(job->saved);
    stream_destroy(job->stream);
    groups_destroy(&job->groups);
}

/* Most tokens choose experts 6 and 7, the last rank's; none chooses this rank's 2 and 3. */
static void dispatch(struct job *job, const struct dispatcher *dispatcher)
{
    struct tensor x = tensor_new(job->saved, DTYPE_F32, TOKENS, HIDDEN);
    struct tensor indices = tensor_new(job->saved, DTYPE_I32, TOKENS, TOPK);
    struct tensor probs = tensor_new(job->saved, DTYPE_F32, TOKENS, TOPK);
    struct dispatch_flight flight;

    for (int t = 0; t < TOKENS; t++) {
        ((int32_t *)indices.data)[t * TOPK] = t % 5 == 0 ? 0 : 6;
        ((int32_t *)indices.data)[t * TOPK + 1] = t % 7 == 0 ? 4 : 7;
        ((float *)probs.data)[t * TOPK] = ((float *)probs.data)[t * TOPK + 1] = 0.5f;
        for (int i = 0; i < HIDDEN; i++) {
            ((float *)x.data)[t * HIDDEN + i] = (float)t;
        }
    }
    dispatcher->dispatch_start(
        &job->pass,
        &(struct dispatch_input){
            .x = &x, .indices = &indices, .probs = &probs, .num_experts = EXPERTS},
        &job->rows, &flight);
    dispatcher->dispatch_finish(&job->pass, &job->rows, &flight);
}

static void alltoall_receives_what_it_sends(void **state)
{
    struct job job;

    job_start(&job, 1, 0);
    dispatch(&job, &dispatcher_alltoall);
    assert_int_equal(job.rows.num_rows, TOKENS * TOPK);
    for (int r = 0; r < EP; r++) {
        assert_int_equal(job.rows.exchange.recv_rows[r], job.rows.exchange.send_rows[r]);
    }
    assert_true(job.rows.exchange.recv_rows[3] > job.rows.exchange.recv_rows[0]);
    for (int64_t i = 0; i < job.rows.num_rows; i++) {
        assert_true(((float *)job.rows.row_prob.data)[i] == 0.5f);
    }
    job_end(&job);
}

static void etp_ranks_receive_alike(void **state)
{
    struct job job;

    job_start(&job, 2, 1);
    dispatch(&job, &dispatcher_alltoall);
    assert_int_equal(job.rows.num_rows, 2 * TOKENS * TOPK);
    job_end(&job);
}

static void allgather_keeps_as_many_rows(void **state)
{
    for (int etp = 1; etp <= 2; etp++) {
        struct job job;

        job_start(&job, etp, 0);
        dispatch(&job, &dispatcher_allgather);
        assert_int_equal(job.rows.num_rows, etp * TOKENS * TOPK);
        job_end(&job);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alltoall_receives_what_it_sends),
        cmocka_unit_test(etp_ranks_receive_alike),
        cmocka_unit_test(allgather_keeps_as_many_rows),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
