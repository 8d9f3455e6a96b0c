"""Mistakes that the tests must notice. Each is made in a copy of the package, and the test that must fail is run.

    python tests/mutations.py [WORD …]

The words choose the mistakes whose descriptions contain all of them. Without words, all mistakes are made.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# For each file: the mistake, the text that it replaces, the new text, and the test that must fail.
MUTATIONS = {
    "model/configuration_bert4rec": [
        ("a saved copy names published code that it lacks", "if self._auto_class is None:", "if False:",
         "hub/test_publish_code.py::test_a_copy_that_we_save_names_no_code_that_it_lacks"),
    ],
    "model/losses": [
        ("the loss is divided by the labels of its own batch",
         "if num_items_in_batch is None:", "if True:",
         "model/test_exact_training.py::test_accumulated_small_batches_give_the_update_of_one_big_batch[ours]"),
        ("special tokens are labels", "torch.where(labels < FIRST_ITEM_ID,", "torch.where(labels == IGNORE_INDEX,",
         "model/test_training_step.py::test_special_tokens_are_no_labels"),
        ("an excluded label is left out of the softmax", "        logits.scatter_(1, index, of_labels)\n", "",
         "model/test_losses.py::test_excluded_items_are_out_of_the_softmax_but_not_the_label"),
        ("gradients are computed in evaluation", "if not torch.is_grad_enabled():", "if False:",
         "model/test_losses.py::test_without_gradients_the_softmax_is_one_multiplication"),
        ("seen items are negatives", "is_negative &= ~_are_among(negative_ids, excluded_ids)", "pass",
         "model/test_losses.py::test_a_loss_is_that_of_a_loop_over_positions_and_negatives"),
    ],
    "model/catalogue": [
        ("new items have no bias", "for table in (self.get_input_embeddings().weight, self.item_bias.weight):",
         "for table in (self.get_input_embeddings().weight,):",
         "model/test_positions.py::test_a_new_item_starts_with_the_mean_bias"),
        ("new items overwrite the rows of old items", "table[old_size:] = table", "table[FIRST_ITEM_ID:] = table",
         "model/test_modeling.py::test_the_catalogue_grows_in_one_call_and_old_scores_stay_equal_to_the_bit"),
    ],
    "model/layers": [
        ("the filter reads the place that it predicts", "gather_positions(filtered, (position_ids - 1).clamp(min=0))",
         "gather_positions(filtered, position_ids)",
         "model/test_causal_attention.py::test_one_training_pass_gives_the_scores_that_serving_gives_to_each_prefix"),
        ("the filter has no average", "torch.lerp(average, newest.to(average.dtype),",
         "torch.lerp(0 * average, newest.to(average.dtype),",
         "model/test_causal_attention.py::test_the_filter_is_an_average_and_what_the_newest_item_differs_from_it_by"),
        ("attention without a mask looks back only", "self.is_causal = False", "self.is_causal = True",
         "model/test_positions.py::test_embeddings_without_a_mask_are_attended_to_on_both_sides"),
        ("keys are not rotated", "key = rotate(key, cosines, sines)", "pass",
         "model/test_positions.py::test_rotary_scores_depend_on_distances_alone"),
        ("the last layer rotates queries by the angles of the first positions",
         "gather_positions(cosines, query_positions), gather_positions(sines, query_positions)",
         "(part[..., : query_positions.shape[1], :] for part in rotary)",
         "model/test_training_step.py::test_masked_positions_change_neither_loss_nor_gradients"),
        ("the last layer computes the position before each mask",
         "query_states = gather_positions(hidden_states, query_positions)",
         "query_states = gather_positions(hidden_states, (query_positions - 1).clamp(min=0))",
         "model/test_training_step.py::test_masked_positions_change_neither_loss_nor_gradients"),
    ],
    "model/modeling_bert4rec": [
        ("the filter reads [MASK]s", "is_item & (input_ids != MASK_TOKEN_ID)", "is_item",
         "model/test_causal_attention.py::test_the_filter_is_an_average_and_what_the_newest_item_differs_from_it_by"),
        ("padding is attended to", "(attention_mask == 0)[:, None, None] * MASKED_SCORE",
         "(attention_mask == 5)[:, None, None] * MASKED_SCORE",
         "model/test_modeling.py::test_an_item_that_is_not_attended_to_counts_for_nothing"),
        ("attention looks back only", "[:, None, None] * MASKED_SCORE\n",
         "[:, None, None] * MASKED_SCORE\n"
         "            square = torch.ones(2 * attention_mask.shape[-1:])\n"
         "            attention_mask = attention_mask + square.triu(1) * MASKED_SCORE\n",
         "model/test_modeling.py::test_later_items_influence_an_earlier_mask"),
        ("positions are counted over padding",
         "count = attention_mask.long().cumsum(dim=1)", "count = torch.ones_like(attention_mask).cumsum(dim=1)",
         "model/test_modeling.py::test_padding_on_either_side_gives_the_same_scores"),
        ("learned_from_end counts from the start", "return count[:, -1:] - count", "return (count - 1).clamp(min=0)",
         "model/test_positions.py::test_positions_are_counted_from_the_side_that_the_config_names"),
        ("[PAD] is always in the softmax", 'if self.config.pad_in_softmax and name == "softmax":', "if True:",
         "model/test_training_step.py::test_the_loss_is_the_cross_entropy_over_items_alone"),
        ("seen items stay in the softmax", "if input_ids is not None and self.config.filter_seen_items:", "if False:",
         "model/test_training_step.py::test_where_seen_items_are_filtered_a_row_shows_no_alternatives_to_its_labels"),
        ("the evaluation loss ignores seen items",
         "seen_ids=seen_ids,", "seen_ids=seen_ids if self.training else None,",
         "model/test_training_step.py::test_the_loss_is_that_of_the_logits[rotary-pre-False-True]"),
        ("half-precision weights score in half precision",
         "return nn.functional.linear(states.float(), vectors, biases)",
         "return nn.functional.linear(states, vectors.to(states), biases.to(states))",
         "model/test_modeling.py::test_a_bfloat16_model_scores_in_float32"),
        ("autocast scores in half precision", "return torch.autocast(states.device.type, enabled=False)",
         "return contextlib.nullcontext()",
         "model/test_recommendation.py::test_autocast_does_not_tie_neighbours_in_the_ranking"),
        ("a loss of special tokens goes unnoticed", "logits.register_hook(_check_special_tokens)", "pass",
         "model/test_training_step.py::test_a_loss_that_reads_special_tokens_is_refused"),
        ("a wrapper of the item vectors is bypassed",
         "is_wrapped = type(module) is not ItemEmbeddings or", "is_wrapped = False and",
         "model/test_recommendation.py::test_rows_that_are_viewed_and_rows_that_are_looked_up_have_the_same_scores"),
    ],
    "model/recommendation": [
        ("an exclusion for all rows applies to the first row only",
         "else exclude_ids.expand(batch_size, -1)", "else exclude_ids",
         "model/test_recommendation.py::test_what_is_excluded_for_one_row_of_all_is_excluded_for_all"),
        ("special tokens are ranked", "scores[:, : FIRST_ITEM_ID - start] = -torch.inf", "pass",
         "model/test_recommendation.py::test_special_tokens_are_never_recommended_however_bad_the_items"),
        ("excluded items are ranked", 'scores.scatter_reduce_(1, columns.where(inside, 0), ceiling, "amin")', "pass",
         "model/test_recommendation.py::test_where_everything_is_excluded_ids_are_0_and_scores_minus_infinity"),
        ("a tie counts for the target", "torch.ge(chunk_scores, target_scores", "torch.gt(chunk_scores, target_scores",
         "model/test_recommendation.py::test_a_tie_counts_against_the_target"),
        ("candidates are ignored", "self._chunks(prediction_states, pairs, candidate_ids, exclude_ids, allowed)",
         "self._chunks(prediction_states, pairs, None, exclude_ids, allowed)",
         "model/test_recommendation.py::test_a_target_is_ranked_among_candidates_that_lack_it"),
        ("token ids begin at 0 in every chunk",
         "yield scores, chunk_ids.unsqueeze(0)", "yield scores, chunk_ids.unsqueeze(0) - start",
         "model/test_recommendation.py::test_recommend_and_rank_agree_with_sorting_the_full_matrix"
         "[rotary-pre-excluded-catalogue-7]"),
        ("a condition does not hold for candidates", "forbidden = forbidden | ~allowed[item_ids]", "pass",
         "serving/test_rules.py::test_exclusions_and_candidates_of_call_and_row_hold_under_rules_too"),
        ("a condition does not hold for the catalogue", "scores.masked_fill_(~allowed[start:end], -torch.inf)", "pass",
         "serving/test_rules.py::test_a_boost_is_a_number_of_standard_deviations_of_the_eligible_items"),
        ("a boost is a number of logits", "keys = scores if boosts is None else scores + deviation * boosts[item_ids]",
         "keys = scores if boosts is None else scores + boosts[item_ids]",
         "serving/test_rules.py::test_a_boost_is_a_number_of_standard_deviations_of_the_eligible_items"),
        ("an index is asked for no more items under a condition", "math.ceil(size / share)", "size",
         "serving/test_rules.py::test_an_index_gives_what_exact_search_gives"),
        ("the items that an index finds are enough", "if pool[0].shape[1] < size or pool[0].isneginf().any():",
         "if False:",
         "serving/test_rules.py::test_where_an_index_finds_too_few_items_that_meet_a_condition_the_search_is_exact"),
    ],
    "model/explanation": [
        ("similar items depend on what all vectors have in common",
         "[0].float() - mean\n        shortest", "[0].float()\n        shortest",
         "model/test_similar_items.py::test_the_angle_between_vectors_is_what_counts_whatever_their_lengths_and_their_mean"),
        ("rounding errors of the mean vector are a direction", ".maximum(shortest)", "",
         "model/test_similar_items.py::test_new_items_with_the_mean_vector_are_like_nothing_not_like_one_another"),
        ("an item is similar to itself", "                excluded,\n                scores_of",
         "                exclude_ids,\n                scores_of",
         "model/test_similar_items.py::test_similar_items_agree_with_loops"),
        ("the scores of an explanation are not centred",
         "[0].float() - mean\n                # The biases", "[0].float()\n                # The biases",
         "model/test_explanations.py::test_the_networks_contributions_of_all_candidates_sum_to_0"),
        ("only the oldest occurrence of an item is left out",
         "[[event for event in events if event[0] != item] for item in left_out]",
         "[[e for n, e in enumerate(events) if n != [i for i, _ in events].index(item)] for item in left_out]",
         "model/test_explanations.py::test_a_contribution_is_what_the_centred_score_loses_without_the_item"),
        ("excluded items are part of the mean of an explanation",
         "excluded = excluded[excluded >= FIRST_ITEM_ID].unique()", "excluded = excluded[:0]",
         "model/test_explanations.py::test_a_contribution_is_what_the_centred_score_loses_without_the_item"),
        ("a history that is shortened does not read an older item", "for kept in (events, *shortened)",
         "for kept in (events, *([e for e in some if e in events[-11:]] for some in shortened))",
         "model/test_explanations.py::test_a_contribution_is_what_the_centred_score_loses_without_the_item"),
    ],
    "serving/conditions": [
        ("a comment is read over", 'if token.comments or name == "HINT":', "if False:",
         "serving/test_conditions.py::test_everything_else_is_refused_in_one_sentence"),
        ("an argument that no example has is let through",
         "any((type(node), name) not in allowed for name in _arguments(node))",
         "type(node) not in {kind for kind, _ in allowed}",
         "serving/test_conditions.py::test_everything_else_is_refused_in_one_sentence"),
    ],
    "serving/item_table": [
        ("null meets a condition", "np.ma.filled(passes, False)", "np.ma.filled(passes, True)",
         "serving/test_conditions.py::test_a_condition_selects_the_items_that_meet_it"),
        ("DuckDB reads files", '"enable_external_access": False', '"enable_external_access": True',
         "serving/test_conditions.py::test_duckdb_itself_reads_no_file_and_no_variable"),
        ("an item without a row has the values of another", "pa.array(places, mask=places < 0)",
         "pa.array(places.clip(0))",
         "serving/test_item_table.py::test_a_csv_file_has_a_row_for_each_item_and_values_of_one_type"),
    ],
    "serving/rules": [
        ("a quota counts the first value of a list", "is_full.view_as(values).any(dim=2)",
         "is_full.view_as(values)[:, :, 0]",
         "serving/test_rules.py::test_quotas_count_each_value_of_a_list_and_no_null"),
        ("items with null share a quota", "counts[:, 0] = 0  # the padding", "pass",
         "serving/test_rules.py::test_quotas_count_each_value_of_a_list_and_no_null"),
        ("an item is compared with the last one above it only", "torch.maximum(nearest, similar)", "similar",
         "serving/test_rules.py::test_diversity_prefers_items_that_are_unlike_those_above_them"),
    ],
    "model/history_scores": [
        ("half precision rounds counted scores", "torch.zeros(shape, dtype=dtype)", "torch.zeros(shape)",
         "model/test_history_scores.py::test_counts_stay_exact_in_a_model_that_is_loaded_in_half_precision"),
        ("items that are not attended to are counted", "is_item = is_item & (attention_mask != 0)", "pass",
         "model/test_history_scores.py::test_pairs_are_unique_in_order_and_the_sums_that_loops_give"),
        ("old items count as much as new ones", "torch.pow(0.5, exponents", "torch.pow(1.0, exponents",
         "model/test_history_scores.py::test_of_the_newest_items_each_counts_half_as_much_as_the_one_after_it"),
        ("the oldest items are taken for the newest", "is_item.flip(1).cumsum(1).flip(1) - 1  # the number",
         "is_item.cumsum(1) - 1  # the number",
         "model/test_history_scores.py::test_of_the_newest_items_each_counts_half_as_much_as_the_one_after_it"),
        ("the recency of an item is that of its oldest occurrence", "MAX_PAIRS + ages.clamp(min=0)",
         "MAX_PAIRS + (MAX_PAIRS - 1 - ages)",
         "model/test_history_scores.py::test_an_item_is_counted_in_one_place_with_the_age_of_its_newest_occurrence"),
        ("next items of an older item are added", "self.next_item_scores[newest_ids[:, :1]].float() * config",
         "self.next_item_scores[newest_ids[:, 1:2]].float() * config",
         "model/test_history_scores.py::test_pairs_are_unique_in_order_and_the_sums_that_loops_give"),
        ("a repeated item is counted at each occurrence",
         "counts * (is_first & (item_ids > 0))", "counts * (item_ids > 0)",
         "model/test_history_scores.py::test_an_item_is_counted_in_one_place_with_the_age_of_its_newest_occurrence"),
        ("values of one item are not summed", "while distance < most:", "while distance < 1:",
         "model/test_history_scores.py::test_pairs_are_unique_in_order_and_the_sums_that_loops_give"),
        ("a weight is not read from the config", "shares * config.transition_weight", "shares * 1.0",
         "model/test_history_scores.py::test_the_weighted_features_sum_to_the_scores"),
        ("pairs of later chunks are added to wrong columns", "columns = item_ids - start", "columns = item_ids",
         "model/test_history_scores.py::test_pairs_are_added_where_their_items_are"),
        ("next items belong to all of the newest items", "if place == 0:", "if place >= 0:",
         "model/test_explanations.py::test_the_counted_parts_sum_to_the_value_that_is_added_to_the_score"),
        ("popularity is a similarity", "self.successor_scores[FIRST_ITEM_ID:].amax()", "self.successor_scores.amax()",
         "model/test_similar_items.py::test_the_strongest_successor_of_the_catalogue_counts_as_much_as_an_equal_vector"),
    ],
    "model/tokenization_bert4rec": [
        ("token ids do not follow the raw ids", "for raw_id in raw_ids:", "for raw_id in reversed(raw_ids):",
         "model/test_tokenization.py::test_items_are_numbered_from_3_sorted_by_raw_id"),
        ("an unknown item is the first of the catalogue", "known, unknown = self._token_ids, UNK_TOKEN_ID",
         "known, unknown = self._token_ids, FIRST_ITEM_ID",
         "model/test_tokenization.py::test_unknown_items_are_left_out_with_one_warning_that_counts_them"),
        ("no [MASK] is appended", "return [*self._newest(token_ids, max_length), MASK_TOKEN_ID]",
         "return [*self._newest(token_ids, max_length)]",
         "model/test_tokenization.py::test_append_mask_keeps_the_newest_items"),
        ("a long history keeps its oldest items", "return [*self._newest(token_ids, max_length), MASK_TOKEN_ID]",
         "return [*token_ids[: max_length - 1], MASK_TOKEN_ID]",
         "model/test_tokenization.py::test_a_long_history_loses_its_oldest_items"),
        ("new items come before the old ones",
         "for raw_id in new:\n            vocabulary[_to_token(raw_id)] = len(vocabulary)",
         "vocabulary = {token: number + len(new) * (number > 2) for token, number in vocabulary.items()}\n"
         "        vocabulary |= {_to_token(raw_id): number for number, raw_id in enumerate(new, 3)}",
         "model/test_tokenization.py::test_added_items_are_appended_and_nothing_is_renumbered"),
        ("titles and counts are not saved",
         'content = {"counts": self._counts, "titles": self._titles}', "content = {}",
         "model/test_tokenization.py::test_titles_and_counts_survive_saving_and_copying"),
    ],
    "data/data_collator": [
        ("the mask ratio is ignored", "random.random(input_ids.shape) < self.mask_ratio",
         "random.random(input_ids.shape) < 0.2",
         "data/test_data_collator.py::test_the_share_of_masked_items_is_near_the_mask_ratio"),
        ("a row may be left without a mask",
         "masked[needed, np.where(only_last[needed], last[needed], anywhere)] = True", "pass",
         "data/test_data_collator.py::test_every_row_that_has_items_has_a_label"),
        ("items that are not masked have labels",
         "masked_positions = _pad([row.nonzero()[0] for row in masked], -1)",
         "masked_positions = _pad([np.arange(len(row)) for row in masked], -1)",
         "data/test_data_collator.py::test_masked_inputs_are_always_mask_and_labels_the_original"),
        ("the window is always the newest", "random.integers(low, high + 1) if self.random_windows else high", "high",
         "data/test_data_collator.py::test_random_windows_of_a_long_history_vary_and_are_contiguous"),
    ],
    "data/counting": [
        ("held-out items are counted", "counted = sample.is_trained()", "counted = sample.item_ids >= FIRST_ITEM_ID",
         "data/test_counting.py::test_only_the_training_part_counts"),
        ("items of two users are neighbours", "near = row_of[:-distance] == row_of[distance:]",
         "near = torch.ones_like(first, dtype=torch.bool)",
         "data/test_counting.py::test_items_of_different_users_have_nothing_in_common"),
        ("co-occurrences are not divided by item frequencies",
         "of_item[first] * (of_neighbour / of_neighbour.sum())[second]", "1",
         "data/test_counting.py::test_products_are_the_positive_mutual_information"),
        ("the weakest transitions are kept", "torch.argsort(values, descending=True, stable=True)",
         "torch.argsort(values, stable=True)",
         "data/test_counting.py::test_transitions_are_the_strongest_of_what_followed_an_item"),
        ("all successors in the window have equal weight", "0.5**distance)", "1.0)",
         "data/test_counting.py::test_transitions_are_the_strongest_of_what_followed_an_item"),
        ("the sample of a stream has more of its first histories", "    drop()\n    return kept[0]",
         "    return concatenated(kept)",
         "data/test_streaming.py::test_of_a_large_log_the_same_histories_are_counted_from_disk_as_in_memory"),
        ("a stream is read again for each count", "if key not in histories.remembered:", "if True:",
         "data/test_streaming.py::test_a_log_on_disk_is_read_once_for_each_count"),
    ],
    "evaluation/calibration": [
        ("weights are measured on the users that they were chosen on", "search.best(~held_out)",
         "search.best(np.ones(len(folds), bool))",
         "evaluation/test_calibration.py::test_weights_that_only_fit_the_noise_are_not_adopted"),
        ("weights are adopted without a clear gain", "bool(difference.mean() > clearly * error)",
         "bool(difference.mean() > -1)",
         "evaluation/test_calibration.py::test_weights_that_only_fit_the_noise_are_not_adopted"),
        ("weights that were chosen before give way to chance",
         "CLEARLY_BETTER_AGAIN if were_chosen", "1.0 if were_chosen",
         "evaluation/test_calibration.py::"
         "test_weights_that_were_chosen_before_give_way_only_to_others_that_are_better_by_two_standard_errors"),
        ("items with equal scores are not counted against the target", "np.cumsum(differences >= 0)",
         "np.cumsum(differences > 0)", "evaluation/test_calibration.py::"
         "test_the_gains_of_any_weights_are_those_of_ranking_with_them[True]"),
        ("excluded items are compared with the target", " & (values_of(excluded, others) == 0)", "",
         "evaluation/test_calibration.py::test_the_gains_of_any_weights_are_those_of_ranking_with_them[True]"),
    ],
    "evaluation/neighbours": [
        ("the newest items of a history do not count more", "weights = 1 - matched_ages.float() / MATCHED_ITEMS",
         "weights = torch.ones(len(matched_ages))",
         "evaluation/test_neighbours.py::test_session_knn_scores_the_items_of_similar_histories"),
        ("an item is its own neighbour", "cosines.fill_diagonal_(0)", "pass",
         "evaluation/test_neighbours.py::test_item_knn_sums_the_cosines_of_the_nearest_items"),
    ],
    "evaluation/report": [
        ("equally frequent items are put into different groups",
         "np.unique(counts, return_inverse=True, return_counts=True)",
         "np.unique(counts + np.arange(len(counts)) / 100, return_inverse=True, return_counts=True)",
         "evaluation/test_report.py::test_head_torso_and_tail_are_told_by_the_share_of_events_of_more_frequent_items"),
        ("a report overwrites other files", "if others or (names and not _has_keys",
         "if False and (names and not _has_keys",
         "evaluation/test_report.py::test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_is"),
        ("popularity recommends seen items", "users[free_before <= number]", "users[:0]",
         "evaluation/test_report.py::test_popularity_recommends_the_most_frequent_items_that_are_not_excluded"),
    ],
    "training/initialization": [
        ("a new item starts at the mean of new items as well", "(first >= num_old) & (second < num_old)",
         "(first >= num_old) & (second != first)",
         "data/test_counting.py::test_a_new_item_starts_among_its_neighbours[kind0]"),
        ("the first layer does not pass on the mean of a history",
         "copy_(attention.value.weight.T)", "copy_(attention.value.weight)",
         "data/test_counting.py::test_the_first_layer_hands_on_the_mean_of_a_history"),
    ],
    "data/duckdb_tables": [
        ("nanoseconds with a zone lose three digits",
         "if pa.types.is_timestamp(kind) and kind.tz is not None and kind.unit == \"ns\":",
         "if False:",
         "data/test_logs.py::test_pandas_own_times_with_a_zone_are_times"),
    ],
    "data/file_formats": [
        ("lists of whole numbers become vectors", "\"DOUBLE\" if not is_whole", "\"DOUBLE\" if is_whole",
         "data/test_item_tables.py::test_json_lines_hold_what_parquet_holds"),
    ],
    "data/logs": [
        ("the first of two columns of the same name is read",
         "if self.columns.count(name) > 1:", "if False:",
         "data/test_log_sources.py::test_a_column_that_is_asked_for_and_there_twice_is_refused"),
    ],
    "serving/item_index": [
        ("a loaded index searches less widely", "return cls(index, num_probes)\n\n    def __len__",
         "return cls(index, 1)\n\n    def __len__",
         "model/test_pipeline.py::test_a_loaded_index_looks_as_far_as_the_one_that_was_saved"),
    ],
    "data/splits": [
        ("the validation item trains", "train_end = has_targets.ifelse(ends[0],",
         "train_end = has_targets.ifelse(ends[1],",
         "data/test_splits.py::test_leave_one_out_orders_by_time_and_holds_out_the_last_two"),
        ("the first user of a file is in the file before too", "(events.user_id < end)", "(events.user_id <= end)",
         "data/test_preparation.py::test_a_large_log_becomes_several_files_with_the_same_histories"),
        ("events after the cut train", "train_end = ends[0] if users is None", "train_end = ends[1] if users is None",
         "data/test_splits.py::test_temporal_cuts_freeze_every_history_at_the_cut"),
    ],
    "training/resume": [
        ("an update forgets the model that it started from", "self.trainer._determine_best_metric(metrics, trial=None)",
         "return",
         "training/test_continued_models.py::test_a_model_that_goes_on_is_told_apart_from_where_it_began"),
    ],
    "runs/train": [
        ("an update trains on all rows", "return rows if len(rows) else None", "return None",
         "training/test_continued_models.py::test_an_update_trains_on_the_new_events_by_defaults_of_its_own"),
        ("an update has the defaults of a new model", "        _choose_for_update(args, config)", "        pass",
         "training/test_continued_models.py::test_an_update_trains_on_the_new_events_by_defaults_of_its_own"),
    ],
    "data/rows": [
        ("an update trains on seen events as new ones", "is_trained()] > after", "is_trained()] >= after",
         "data/test_rows.py::test_an_update_trains_on_the_histories_with_new_events_and_on_as_many_old_rows"),
        ("an update trains on new rows only", "users = np.concatenate((users, old_users))",
         "starts, ends, old_starts, old_ends = starts, ends, starts[:0], ends[:0]",
         "data/test_rows.py::test_an_update_trains_on_the_histories_with_new_events_and_on_as_many_old_rows"),
        ("validation ranks the test item", "positions = histories.target_positions[part][users]",
         'positions = histories.target_positions["test"][users]',
         "data/test_rows.py::test_a_user_without_a_past_is_ranked_from_a_lone_mask"),
        ("the target is in the history it is ranked from",
         "past = histories.item_ids[start : start + position]",
         "past = histories.item_ids[start : start + position + 1]",
         "data/test_rows.py::test_ranking_rows_are_what_serving_gets"),
        ("a part of streamed histories is read again for each batch", "2 + int(np.searchsorted(",
         "int(np.searchsorted(",
         "training/test_streamed_runs.py::"
         "test_every_epoch_has_every_row_once_in_another_order_and_a_reader_reads_each_of_its_parts_once"),
        ("users without a target are drawn", "here.target_positions[part] >= 0", "here.target_positions[part] >= -1",
         "data/test_streaming.py::test_what_is_counted_from_disk_is_what_is_counted_in_memory"),
        ("only the window's items are excluded", "np.unique(seen) if", "np.unique(row[:-1]) if",
         "data/test_rows.py::test_ranking_rows_are_what_serving_gets"),
        ("streamed rows are split twice, and some are lost",
         'load_dataset("parquet", data_files=files, split="train", streaming=True)',
         'IterableDataset.from_generator(lambda: iter('
         'load_dataset("parquet", data_files=files, split="train", streaming=True)))',
         "data/test_streaming.py::test_processes_and_workers_share_the_rows_without_repeats_or_gaps[1-2]"),
    ],
    "evaluation/metrics": [
        ("targets that are never shown are left out of the mean", "count = max(len(ranks), 1)",
         "count = max((ranks > 0).sum(), 1)", "evaluation/test_metrics.py::test_metrics_of_known_ranks"),
    ],
    "training/learning_curve": [
        ("a noisy last evaluation is taken for a rise",
         "max(2 * standard_error_from_metrics(best, num_users), RISE * values[-1])", "RISE * values[-1]",
         "training/test_learning_curve.py::test_a_run_that_still_rises_at_its_end_is_called_under_trained"),
        ("the end of a converged run is taken for a rise", "RISE = 0.07", "RISE = 0.0",
         "training/test_learning_curve.py::test_a_run_that_still_rises_at_its_end_is_called_under_trained"),
        ("a falling loss is taken for too few steps although the ranking is worse",
         'best["step"] > 0.75 * steps[-1]', "True",
         "training/test_learning_curve.py::test_a_run_whose_validation_loss_still_falls_at_its_end_is_called_under_trained"),
        ("the chosen weights are a point of the curve at the last step",
         'not (ended and chosen_step != entry["step"])', "True",
         "training/test_learning_curve.py::test_the_chosen_weights_evaluated_at_the_end_are_no_point_of_the_curve_at_the_last_step"),
    ],
    "hub/push": [
        ("the pickled arguments are pushed", 'PRIVATE_FILES = ["training_args.bin"]', "PRIVATE_FILES: list[str] = []",
         "hub/test_push.py::test_nothing_of_this_machine_and_no_token_is_pushed"),
    ],
    "hub/model_card": [
        ("the card lacks a metric", "for name, value in metrics.items()",
         'for name, value in metrics.items() if name != "MRR"',
         "hub/test_push.py::test_the_card_has_every_stored_metric_under_its_protocol"),
    ],
    "training/trainer": [
        ("label smoothing counts special tokens", '["logits"][..., FIRST_ITEM_ID:]', '["logits"]',
         "training/test_trainer_features.py::test_label_smoothing_is_over_items_alone"),
        ("targets that the catalogue lacks lower the loss", "len(output.label_ids) / num_known", "1",
         "training/test_trainer.py::test_the_loss_is_the_mean_over_targets_that_the_catalogue_has_whatever_the_batches"),
        ("ranks do not leave out seen items", "top_k=COVERAGE_CUTOFF, **ranking",
         "top_k=COVERAGE_CUTOFF, **(ranking | {'exclude_ids': None})",
         "training/test_trainer.py::test_evaluation_ranks_are_the_places_in_the_pipelines_answers_user_by_user"),
        ("the item table decays", 'if "item_embeddings" not in name', "",
         "training/test_trainer.py::test_weight_decay_is_not_of_the_item_table"),
        ("ranks stay in the order of evaluation", "np.argsort(by_length(test_dataset))", "np.arange(len(test_dataset))",
         "training/test_trainer.py::test_evaluation_ranks_are_the_places_in_the_pipelines_answers_user_by_user"),
        ("the negatives are split over GPUs", "if args.n_gpu > 1:", "if False:",
         "training/test_processes.py::test_of_several_gpus_without_a_launcher_one_is_used"),
        ("a short last batch of users is not evaluated", "args.train_sampling_strategy = False,",
         "args.train_sampling_strategy = given[0],",
         "training/test_trainer_contract.py::"
         "test_rows_of_a_last_short_batch_are_dropped_from_training_and_from_no_evaluation"),
        ("a hyperparameter search keeps the first collator", "if self.collates_by_args:", "if False:",
         "training/test_trainer_contract.py::test_optuna_searches_with_each_trainer[Bert4RecTrainer]"),
    ],
    "training/item_feature_training": [
        ("an own part that was left out has a gradient", "of_vectors[self.chosen], of_biases[self.chosen] = 0.0, 0.0",
         "pass",
         "training/test_item_feature_training.py::test_steps_are_those_of_two_tables_whose_sum_the_network_reads[0.3]"),
        ("the item table lacks the change of the projection", "            table += part\n", "",
         "training/test_item_feature_training.py::test_steps_are_those_of_two_tables_whose_sum_the_network_reads[0.3]"),
        ("items without events train the projection", "kept = is_wanted[owners]", "kept = is_wanted[owners] | True",
         "training/test_item_feature_training.py::test_steps_are_those_of_two_tables_whose_sum_the_network_reads[0.3]"),
    ],
    "training/model_folders": [
        ("metrics of other weights are stored", "self.evaluated_step == self.state.global_step\n", "True\n",
         "training/test_trainer.py::test_numbers_of_other_weights_are_not_stored"),
        ("a checkpoint lacks its preparation", "write_file(folder / PREPARATION_FILE,", "print(",
         "training/test_resume.py::test_a_checkpoint_is_a_full_model_folder"),
        ("a checkpoint has no tokenizer", "super().save_model(str(new), _internal_call=True)",
         "super().save_model(str(new), _internal_call=True)\n"
         "            [path.unlink() for path in new.glob(\"tokenizer*\")]",
         "command_line/test_cli.py::test_every_checkpoint_is_a_whole_model_folder_too"),
        ("metrics of other weights are kept", "and _weights_digest(new) != old_weights:", "and False:",
         "hub/test_push.py::test_test_numbers_come_along_until_the_weights_are_others"),
        ("the pickled arguments have the token", "setattr(args, name, None)", "pass",
         "training/test_trainer_contract.py::test_no_token_is_written_and_the_arguments_stay_as_they_were"),
    ],
    "training/sampler": [
        ("every epoch of streamed rows has the same order", "(self.seed, self.epoch, *numbers)",
         "(self.seed, 0, *numbers)",
         "training/test_streamed_runs.py::"
         "test_every_epoch_has_every_row_once_in_another_order_and_a_reader_reads_each_of_its_parts_once"),
        ("the processes of a step get batches of different lengths", "self._random(1, number)", "random",
         "training/test_streamed_runs.py::test_batches_have_similar_lengths_and_those_of_a_step_too"),
        ("every epoch has the same order", "(self.seed, self.epoch))", "(self.seed, 0))",
         "training/test_resume.py::test_a_run_resumed_in_mid_epoch_neither_loses_nor_repeats_rows"
         "_and_the_next_epoch_has_another_order"),
        ("the last, short batch is dropped", "*order[whole:].tolist()]", "]",
         "training/test_sampler.py::test_batches_are_of_similar_length_and_every_epoch_has_every_row_in_an_order_of_its_own"),
    ],
    "model/pipeline_inputs": [
        ("a set is a history", "isinstance(items, set | frozenset)", "False",
         "model/test_pipeline.py::test_a_wrong_request_among_others_is_an_error_that_says_which_and_what_was_expected"),
    ],
    "model/pipeline": [
        ("seen items are recommended",
         "if filter_seen_items:", "if False:",
         "model/test_pipeline.py::test_the_folders_policy_filters_and_the_argument_overrides_it"),
        ("only the window's items are left out",
         "for token_id, kind in zip(history, type_ids, strict=True) if kind == target_type",
         "for token_id, kind in [*zip(history, type_ids)][1 - self.model.config.max_position_embeddings :] if kind == "
         "target_type",
         "model/test_pipeline.py::test_the_whole_history_is_filtered_also_before_the_models_window"),
        ("the exclusions of the call are forgotten",
         'inputs["exclude_ids"] = torch.cat((inputs["exclude_ids"], shared), dim=1)', "pass",
         "model/test_pipeline.py::test_exclusions_and_candidates_of_call_and_row_meet_in_one_batch"),
        ("items that speak against a recommendation are named", "return source_ids * (contributions > 0),",
         "return source_ids,",
         "model/test_pipeline.py::test_an_explanation_names_the_strongest_items_of_the_history_with_titles"),
        ("an unknown item has similar items", "if UNK_TOKEN_ID in token_ids:", "if False:",
         "model/test_pipeline.py::test_a_wrong_request_for_similar_items_is_an_error"),
        ("the limits of the pipeline do not hold for similar items", "options = self._forward_params | given",
         "options = given",
         "model/test_pipeline.py::test_similar_items_have_limits_and_those_of_the_pipeline_hold_until_the_call_says_otherwise"),
    ],
    "serving/history_files": [
        ("the exclusions of a row are ignored", 'further = ("exclude", "candidates", "event_type")',
         'further = ("candidates", "event_type")',
         "serving/test_bulk.py::test_the_exclusions_and_candidates_of_a_row_hold_for_it_as_in_the_pipeline"),
        ("rows between two parts are answered twice", "min(stop - row, len(read))", "len(read)",
         "serving/test_history_files.py::test_parts_have_every_row_once_whatever_the_row_groups"),
        ("a null in a list is an item", "if type(item) is not str and not _is_integer(item)",
         "if type(item) is not str and item is not None and not _is_integer(item)",
         "serving/test_history_files.py::test_a_value_that_is_no_list_of_ids_is_an_error_that_names_file_column_and_row"),
    ],
    "serving/bulk": [
        ("a folder of other files is replaced", "if not PART_NAME.fullmatch(name) or not _is_output(folder / name):",
         "if not PART_NAME.fullmatch(name):",
         "serving/test_bulk.py::test_an_earlier_folder_is_replaced_with_all_its_parts_and_one_with_other_files_is_not"),
        ("a process answers the first parts alone", "range(number, len(parts), num_processes)",
         "range(number, num_processes)",
         "serving/test_bulk.py::test_a_folder_of_parts_gives_one_file_or_a_folder_of_parts_with_the_same_rows"),
    ],
    "serving/onnx_export": [
        ("the graph ignores exclude_ids",
         "allowed & ~(torch.zeros_like(scores).scatter(1, exclude_ids, 1.0) > 0)", "allowed",
         "serving/test_onnx_export.py::test_torch_export_answers_like_the_model"),
    ],
}  # fmt: skip


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        # Without bytecode, Python reads each change, even two within a second or one that keeps the length of a file.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Wide lines hold the name of a test and its error.
        "COLUMNS": "500",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfEs"]
    command += [f"tests/{test}" for test in tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def main(words: list[str]) -> int:
    chosen = [
        (file, *mutation)
        for file, mutations in MUTATIONS.items()
        for mutation in mutations
        if all(word in mutation[0] for word in words)
    ]
    if not chosen:
        raise ValueError(f"no mistake in the table has all of these words: {' '.join(words)}")
    caught = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("bert4rec_hf", "tests"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "setup.cfg", folder)
        for file, _, old, _, _ in chosen:
            count = (folder / "bert4rec_hf" / f"{file}.py").read_text("utf-8").count(old)
            if count != 1:
                raise ValueError(f"{file}.py must have this text once, and has it {count} times: {old}")
        outcome = run(folder, *sorted({test for *_, test in chosen}))
        if outcome.returncode or "\nSKIPPED" in outcome.stdout:
            print(outcome.stdout, outcome.stderr, "without a mistake, all of these tests must pass", sep="\n")
            return 1
        for file, mistake, old, new, test in chosen:
            path = folder / "bert4rec_hf" / f"{file}.py"
            source = path.read_text("utf-8")
            path.write_text(source.replace(old, new), "utf-8")
            outcome = run(folder, test)
            path.write_text(source, "utf-8")
            # Exit status 1 may also mean an error in a fixture or code that does not run. Only failed assertions count.
            failed = re.findall(r"^FAILED .* - (?:assert|AssertionError|Failed)", outcome.stdout, re.MULTILINE)
            found = outcome.returncode == 1 and len(failed) > 0
            caught += found
            print(f"{file}.py: {mistake} | {test} | {'caught' if found else 'NOT CAUGHT'}", flush=True)
            if not found:
                print(outcome.stdout[-2000:], outcome.stderr[-2000:])
    print(f"{caught} of {len(chosen)} mistakes caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
