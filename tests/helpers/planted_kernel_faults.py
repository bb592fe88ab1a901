"""Faults of the kernels and their specification that tests/test_planted_faults.py plants, by file."""

from planted_faults import Fault

OPS = "kernels/nanogpt_kernels/ops"

KERNEL_FAULTS = {
    f"{OPS}/attention/tile_access.py": [
        Fault(
            "a query sees the next key",
            "queries[:, None] >= keys[None, :]",
            "queries[:, None] + 1 >= keys[None, :]",
            "tests/ops/test_attention_masks.py -k 'test_values_and_gradients and float32'",
        ),
        Fault(
            "a query does not see its own key in backward",
            "queries[None, :] >= keys[:, None]",
            "queries[None, :] > keys[:, None]",
            "tests/ops/test_attention_masks.py -k 'test_values_and_gradients and float32'",
        ),
        Fault(
            "a tile that crosses the diagonal is not masked",
            "if n + KEYS > m:",
            "if n > m:",
            "tests/ops/test_attention.py -k test_values_and_lse",
        ),
        Fault(
            "rows beyond T are loaded in backward",
            "(r < T - start)[:, None]",
            "(r <= T - start)[:, None]",
            "tests/ops/test_attention_backward.py -k test_gradients",
        ),
    ],
    f"{OPS}/attention/forward.py": [
        Fault(
            "a query attends to earlier documents",
            "s = tl.where(doc_i[:, None] == doc_j[None, :], s",
            "s = tl.where(doc_i[:, None] >= doc_j[None, :], s",
            "tests/ops/test_attention_documents.py -k test_ids_of_any_order",
        ),
        Fault(
            "scores are scaled by the padded head size",
            "/ math.sqrt(D)",
            "/ math.sqrt(block_d(D))",
            "tests/ops/test_attention.py -k test_values_and_lse",
        ),
        Fault(
            "what dropout keeps is not scaled",
            "acc * (keep_scale / l)[:, None]",
            "acc * (1.0 / l)[:, None]",
            "tests/ops/test_attention_masks.py -k 'test_values_and_gradients and float32'",
        ),
    ],
    f"{OPS}/attention/documents.py": [
        Fault(
            "a tile's last query is left out",
            "ids <= highest, at + 1, 0",
            "ids <= highest, at, 0",
            "tests/ops/test_attention_documents.py -k test_spans_are_safe",
        ),
    ],
    f"{OPS}/cross_entropy.py": [
        Fault(
            "the load of a row's end has no mask",
            "tl.load(row_ptr + v, mask=v < width).to(tl.float32)",
            "tl.load(row_ptr + v).to(tl.float32)",
            "tests/ops/test_cross_entropy_bytes.py::test_nothing_is_read_outside_the_operands",
        ),
        Fault(
            "a padding column counts",
            "tl.where(v < valid_vocab, z, ",
            "tl.where(v <= valid_vocab, z, ",
            "tests/ops/test_cross_entropy.py -k 'test_values_and_gradient and 192 and float32'",
        ),
        Fault(
            "the gradient at the target lacks the scale",
            "* factor - grad_scale",
            "* factor - 1.0",
            "tests/ops/test_cross_entropy.py -k 'test_values_and_gradient and 192 and float32'",
        ),
        Fault(
            "a target out of range is read",
            "(target != ignore_index) & (target >= 0) & (target < valid_vocab)",
            "(target != ignore_index) & (target >= 0)",
            "tests/ops/test_cross_entropy.py -k test_a_target_out_of_range",
        ),
    ],
    f"{OPS}/linear_cross_entropy.py": [
        Fault(
            "ignore_index is -1 whatever the caller says",
            "scale, nll[part], ignore_index, valid_vocab)",
            "scale, nll[part], -1, valid_vocab)",
            "tests/ops/test_linear_cross_entropy.py -k test_ignore_index_is_the_callers",
        ),
        Fault(
            "a chunk's gradient of w is that of the first rows",
            "accumulate_weight_grad_(sums_to, logits, x_c)",
            "accumulate_weight_grad_(sums_to, logits, x_rows[: x_c.size(0)])",
            "tests/ops/test_linear_cross_entropy.py -k test_values_and_gradients",
        ),
    ],
    "kernels/nanogpt_kernels/primitives.py": [
        Fault(
            "offsets of rows are 32-bit",
            "return m[:, None] * C + c, ",
            "return m.to(tl.int32)[:, None] * C + c, ",
            "tests/ops/test_primitives.py -k test_a_piece_s_offsets",
        ),
        Fault(
            "all dropouts share a mask",
            "tl.full(low.shape, site, tl.uint32)",
            "tl.full(low.shape, 0, tl.uint32)",
            "tests/ops/test_primitives.py -k test_keep_mask_is_the_reference_s",
        ),
        Fault(
            "GELU's tanh has another constant",
            "1.5957691216057308 + 0.07135481627260025 * square",
            "1.5957691216057308 + 0.07137 * square",
            "tests/ops/test_primitives.py -k test_gelu_and_its_derivative",
        ),
        Fault(
            "GELU's derivative takes the value's constant",
            "0.21406444881780076 * square",
            "0.07135481627260025 * square",
            "tests/ops/test_primitives.py -k test_gelu_and_its_derivative",
        ),
        Fault(
            "a position out of range passes",
            "return start.to(tl.int32), asked == start",
            "return start.to(tl.int32), asked >= start",
            "tests/ops/test_start_on_device.py -k test_out_of_range",
        ),
        Fault(
            "what dropout keeps is not scaled",
            "int(p * 2**32), 1.0 / (1.0 - p)",
            "int(p * 2**32), 1.0",
            "tests/ops/test_residual.py -k test_dtypes",
        ),
    ],
    f"{OPS}/embedding.py": [
        Fault(
            "a segment over several runs loses a piece",
            "first, continues = run + 1, True",
            "first, continues = run + 2, True",
            "tests/ops/test_embedding.py -k test_segments",
        ),
        Fault(
            "a row's gradient goes to the first position",
            "at = (start + t) * C + c",
            "at = t * C + c",
            "tests/ops/test_embedding.py -k test_value_and_gradients",
        ),
        Fault(
            "what main_grad held is lost",
            "total += tl.load(dwte_ptrs, mask=whole, other=0.0).to(tl.float32)",
            "total += 0.0",
            "tests/ops/test_embedding.py -k test_main_grad",
        ),
    ],
    f"{OPS}/norm.py": [
        Fault(
            "eps is outside the root",
            "rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C + eps)",
            "rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C) + eps",
            "tests/ops/test_norm.py -k test_constant_rows",
        ),
        Fault(
            "lanes past a row's end count in its variance",
            "if (i + 1) * BLOCK_C > C:",
            "if i * BLOCK_C > C:",
            "tests/ops/test_norm.py -k test_widths",
        ),
        Fault(
            "backward forgets the mean of g n",
            "dr = (gs[i] - mean_g - ns[i] * mean_gn) * rstd",
            "dr = (gs[i] - mean_g) * rstd",
            "tests/ops/test_norm.py -k test_widths",
        ),
        Fault(
            "the residual's gradient is dropped",
            "dr += drs[i].to(tl.float32)",
            "dr += 0.0",
            "tests/ops/test_add_norm.py -k test_dtypes",
        ),
    ],
    f"{OPS}/adamw.py": [
        Fault(
            "the bias of the second moment is that of the first",
            "1.0 - tl.exp(step * log_beta2)",
            "1.0 - tl.exp(step * log_beta1)",
            "tests/ops/test_adamw.py -k test_twelve_steps",
        ),
        Fault(
            "decay without the learning rate",
            "w -= lr * tl.load(decays_ptr + tile) * w",
            "w -= tl.load(decays_ptr + tile) * w",
            "tests/ops/test_adamw.py -k test_twelve_steps",
        ),
        Fault(
            "clipping takes the scaled norm",
            "max_norm / (norm / loss_scale + 1e-6)",
            "max_norm / (norm + 1e-6)",
            "tests/ops/test_adamw.py -k test_one_step_from_any_state",
        ),
        Fault(
            "a refused update counts as a step",
            "tl.store(scalars_ptr + STEP, step, mask=finite)",
            "tl.store(scalars_ptr + STEP, step)",
            "tests/ops/test_adamw.py -k test_non_finite_gradient",
        ),
    ],
    f"{OPS}/gemm_gelu.py": [
        Fault(
            "rows outside reach the bias's gradient",
            "inside = j + tl.arange(0, J), i + tl.arange(0, I) < M",
            "inside = j + tl.arange(0, J), i + tl.arange(0, I) <= M",
            "tests/ops/test_gemm_gelu.py -k 'test_backward or test_an_infinite_weight'",
        ),
        Fault(
            "the last band of tiles has the height of a whole one",
            "height = tl.minimum(tiles_m - first, GROUP_M)",
            "height = GROUP_M",
            "tests/ops/test_gemm_gelu.py -k test_every_tile_once_in_bands",
        ),
    ],
    "kernels/nanogpt_kernels/launch.py": [
        Fault(
            "a row for a size is passed over at that size",
            "row.up_to >= size]",
            "row.up_to > size]",
            "tests/ops/test_launch.py -k test_the_nearest_row",
        ),
        Fault(
            "a kept row is taken for any size",
            "key = Key(op, architecture(x.device), x.element_size(), size)",
            "key = Key(op, architecture(x.device), x.element_size(), 0)",
            "tests/test_tuned.py -k test_a_kept_row_is_taken",
        ),
    ],
}
