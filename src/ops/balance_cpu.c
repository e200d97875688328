/* Load balance: counts and score sums per expert, the losses made of them, the z-loss, and the bias
 * that balances without a loss. Sums over tokens are in double, by chunks of tokens. */
#include "ops/ops_cpu.h"
#include "ops/router_score_cpu.h"

/* sums [C, 2, E]: counts and score sums of a chunk of tokens. */
static void balance_chunk(const struct router_balance *op, int64_t chunk, double *sums,
                          float *scores)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const int64_t num_columns = op->counts->dim[0], topk = op->indices->dim[1];
    const int64_t first = chunk * ROUTER_CHUNK;
    const int64_t end = first + ROUTER_CHUNK < num_tokens ? first + ROUTER_CHUNK : num_tokens;

    memset(sums, 0, (size_t)(num_columns * 2 * num_experts) * sizeof *sums);
    for (int64_t t = first; t < end; t++) {
        double *counts = sums + t % num_columns * 2 * num_experts, *totals = counts + num_experts;
        const int32_t *indices = (const int32_t *)op->indices->data + t * topk;

        for (int64_t k = 0; k < topk; k++) {
            if (indices[k] >= 0) {
                counts[indices[k]] += 1.0;
            }
        }
        router_balance_scores(op->score, scores, (const float *)op->logits->data + t * num_experts,
                              num_experts);
        for (int64_t e = 0; e < num_experts; e++) {
            totals[e] += (double)scores[e];
        }
    }
}

void router_balance_cpu(struct stream *stream, const struct router_balance *op)
{
    const int64_t num_experts = op->counts->dim[1], num_columns = op->counts->dim[0];
    const int64_t num_chunks = (op->logits->dim[0] + ROUTER_CHUNK - 1) / ROUTER_CHUNK;
    const int64_t num_sums = num_columns * 2 * num_experts;
    double *sums =
        arena_allocate(stream->scratch, (size_t)(num_chunks * num_sums) * sizeof(double));
    const struct thread_floats scores = thread_floats_new(stream, num_experts);

#pragma omp parallel for schedule(static) if (num_chunks > 1)
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
        balance_chunk(op, chunk, sums + chunk * num_sums, thread_floats_mine(&scores));
    }
    for (int64_t i = 0; i < num_columns * num_experts; i++) {
        const int64_t at = i / num_experts * 2 * num_experts + i % num_experts;
        double count = 0.0, total = 0.0;

        for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
            count += sums[chunk * num_sums + at];
            total += sums[chunk * num_sums + at + num_experts];
        }
        ((float *)op->counts->data)[i] = (float)count;
        ((float *)op->score_sums->data)[i] = (float)total;
    }
}

void router_balance_loss_cpu(struct stream *stream, const struct router_balance_loss *op)
{
    const float *counts = op->counts->data, *score_sums = op->score_sums->data;
    const int64_t n = tensor_num_elements(op->counts);
    double sum = 0.0;

    for (int64_t i = 0; i < n; i++) {
        sum += (double)counts[i] * (double)score_sums[i];
    }
    *(float *)op->loss->data = (float)((double)op->factor * sum);
}

void router_z_loss_cpu(struct stream *stream, const struct router_z_loss *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const float *logits = op->logits->data;
    float *z = scratch_floats(stream, num_tokens);
    const struct thread_floats scores = thread_floats_new(stream, num_experts);
    double sum = 0.0;

#pragma omp parallel for schedule(static) if (num_tokens > ROUTER_CHUNK)
    for (int64_t t = 0; t < num_tokens; t++) {
        z[t] = router_softmax(thread_floats_mine(&scores), logits + t * num_experts, num_experts);
    }
    for (int64_t t = 0; t < num_tokens; t++) {
        sum += (double)z[t] * (double)z[t];
    }
    *(float *)op->loss->data =
        num_tokens > 0 ? (float)((double)op->factor * sum / (double)num_tokens) : 0.0f;
}

/* Counts are whole numbers, so that a balanced expert compares equal to the mean and keeps its
 * bias. */
void expert_bias_update_cpu(struct stream *stream, const struct expert_bias_update *op)
{
    const int64_t num_experts = op->bias->dim[0];
    const float *counts = op->counts->data;
    float *bias = op->bias->data;
    double mean = 0.0;

    for (int64_t e = 0; e < num_experts; e++) {
        mean += (double)counts[e];
    }
    mean /= (double)num_experts;
    for (int64_t e = 0; e < num_experts; e++) {
        const double lack = mean - (double)counts[e];

        bias[e] += lack > 0.0 ? op->rate : lack < 0.0 ? -op->rate : 0.0f;
    }
}
