/* Formulas: reference M11.5. A product [m, k] x [k, n] takes 2 m k n, and backward twice forward.
 */
#include "model/flops.h"

double flops_per_step_seed(const struct flops_sizes *sizes)
{
    const bool moe = sizes->num_moe_layers > 0;
    const double H = (double)sizes->hidden_size, L = (double)sizes->num_layers;
    const double S = (double)sizes->seq_length;
    const double groups_per_head = (double)sizes->num_query_groups / (double)sizes->num_heads;
    const double query_size = (double)(sizes->num_heads * sizes->head_dim);
    const double F = (double)(moe ? sizes->moe_ffn_hidden_size : sizes->ffn_hidden_size);
    const double gate = sizes->gated ? 1.5 : 1;
    const double attention = (1 + groups_per_head + S / H) * query_size / H;
    const double experts = F / H * (moe ? (double)sizes->topk : 1) * gate;
    const double shared = (double)sizes->shared_ffn_hidden_size / H * gate;
    const double logits = (double)sizes->vocab_size / (2 * L * H);

    return 12 * (double)sizes->batch_size * S * L * H * H * (attention + experts + shared + logits);
}

double flops_per_step_head(const struct flops_sizes *sizes)
{
    const double H = (double)sizes->hidden_size, S = (double)sizes->seq_length;
    const double tokens = (double)sizes->batch_size * S;
    const double query_size = (double)(sizes->num_heads * sizes->head_dim);
    const double key_size = (double)(sizes->num_query_groups * sizes->head_dim);
    const double num_moe = (double)sizes->num_moe_layers, L = (double)sizes->num_layers;
    const double matrices = sizes->gated ? 3 : 2; /* H x F each */
    const double projections = H * (query_size + 2 * key_size) + query_size * H;
    const double core = S * query_size; /* per token: scores and values, S/2 keys on average */
    const double dense = H * (double)sizes->ffn_hidden_size * matrices;
    const double moe = H * matrices *
                       ((double)sizes->moe_ffn_hidden_size * (double)sizes->topk +
                        (double)sizes->shared_ffn_hidden_size);

    return 6 * tokens *
           (L * (projections + core) + (L - num_moe) * dense + num_moe * moe +
            H * (double)sizes->vocab_size);
}
