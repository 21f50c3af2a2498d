"""The main guarantees: the definition in the package that each depends on, and the tests that notice it broken.

A definition is found by its name in whatever module holds it (`stem:name` in the modules called so), and tests by the
name of a function or of a file. For
`tests/run_mutations.py` every way to break the definition that `tests/mutants.py` knows must make one of the tests fail,
except the `equivalent` ones, which make no difference that a test could see.
"""

from typing import NamedTuple


class Guarantee(NamedTuple):
    """A promise, the name of the definition that it depends on, and tests, the fastest first."""

    promise: str
    definition: str
    tests: str
    equivalent: tuple[str, ...] = ()


GUARANTEES = (
    Guarantee(
        "A file is whole and on the disk before it takes its place; a failed write leaves nothing",
        "atomic_write",
        "test_a_disk_that_does_not_take_the_content_keeps_the_old_file test_the_content_is_on_the_disk_before_the_name_and_the_name_after test_what_a_killed_writer_left_is_removed_by_the_next test_a_folder_that_cannot_be_listed_is_no_obstacle test_a_write_that_fails_at_any_byte_keeps_the_old_file",
    ),
    Guarantee(
        "What a killed writer left goes with the next save, and nothing else",
        "_remove_abandoned",
        "test_what_a_killed_writer_left_is_removed_by_the_next test_a_part_file_that_is_being_written_stays test_a_folder_that_cannot_be_listed_is_no_obstacle",
    ),
    Guarantee(
        "Every part's checksum is verified, once its size is known to be harmless",
        "check_archive",
        "test_a_part_marked_as_a_folder_is_refused test_a_bomb_in_a_checkpoint_is_refused test_a_thousand_flipped_bits_make_no_silent_difference",
    ),
    Guarantee(
        "No code in a file runs",
        "read_torch_file",
        "test_code_in_a_file_is_not_run test_a_thousand_flipped_bits_make_no_silent_difference test_weights",
    ),
    Guarantee(
        "What was written is read back before older states go",
        "write_checkpoint",
        "test_something_strange_in_an_optimizer_group_is_named_before_any_byte test_a_state_that_does_not_verify_is_an_error_and_nothing_older_goes test_a_disk_too_small_is_told_before_writing test_a_folder_in_the_place_of_the_file_is_refused test_weights_that_another_thread_changes_while_they_are_saved_are_refused",
    ),
    Guarantee(
        "Only plain types and tensors are written",
        "check_plain",
        "test_something_strange_in_an_optimizer_group_is_named_before_any_byte test_a_strange_tensor_is_named_before_any_byte test_keys_that_are_no_text_are_named test_laughs_for_a_model_are_refused",
    ),
    Guarantee(
        "A state is compared before it is assigned",
        "check_training_state",
        "test_optimizer_state_that_does_not_fit_is_refused_at_load test_weights_that_do_not_fit_are_refused test_a_wrong_type_anywhere_in_a_state_is_a_checkpoint_error",
    ),
    Guarantee(
        "Optimizer state that does not fit is refused",
        "check_optimizer_state",
        "test_optimizer_state_that_does_not_fit_is_refused_at_load test_another_optimizer_or_head_is_refused test_optimizer_state_goes_by_name test_a_wrong_type_anywhere_in_a_state_is_a_checkpoint_error",
    ),
    Guarantee(
        "Frozen weights are written once, and old states are removed last",
        "Checkpoint.save",
        "test_what_is_frozen_is_written_once test_saved_as_often_and_kept_as_many_as_asked test_a_frozen_file_that_went_is_written_again test_a_state_that_cannot_be_saved_leaves_a_checkpoints_folder_empty test_a_state_that_does_not_verify_is_an_error_and_nothing_older_goes",
    ),
    Guarantee(
        "Frozen weights are told by their SHA-256",
        "put_back",
        "test_a_frozen_file_that_cannot_be_used_is_refused test_another_backbone_is_refused_by_its_sha256 test_a_head_alone_is_small_and_finds_its_backbone",
    ),
    Guarantee(
        "A failed save is a warning",
        "Checkpoint.try_to_save",
        "test_a_save_that_fails_is_a_warning_and_an_error_at_the_end test_a_later_save_that_succeeds_makes_good",
    ),
    Guarantee(
        "A failed save is an error at the end of the run",
        "Checkpoint.after_run",
        "test_a_save_that_fails_is_a_warning_and_an_error_at_the_end test_a_later_save_that_succeeds_makes_good",
    ),
    Guarantee(
        "The folder of another run is refused",
        "Checkpoint.before_first_step",
        "test_a_folder_of_another_run_is_refused test_a_folder_of_another_run_is_refused_on_resuming_too test_an_older_state_can_be_resumed_in_the_same_folder",
    ),
    Guarantee(
        "A damaged newest state names the newest good one",
        "read_newest",
        "test_a_damaged_newest_state_names_the_newest_good_one test_a_folder_and_a_missing_file_are_refused",
    ),
    Guarantee(
        "Resuming begins behind the batches already trained on; no worker outlives an epoch",
        "train_epoch",
        "test_an_older_state_can_be_resumed_in_the_same_folder test_no_worker_outlives_a_failed_step_whose_error_is_kept test_a_scale_that_collapses_is_an_error test_history_counts_epochs_over_the_life_of_the_trainer test_validation_is_in_eval_mode_and_training_in_training_mode test_what_was_left_out_is_remembered_over_a_stop",
    ),
    Guarantee(
        "Other data and other arguments are refused",
        "check_progress",
        "test_other_data_is_refused test_other_arguments_are_refused test_a_checkpoint_outside_of_a_run_cannot_be_resumed test_a_wrong_type_anywhere_in_a_run_is_a_checkpoint_error",
    ),
    Guarantee(
        "A resumed run knows all that the first one did, and that it was ended",
        "Progress.load",
        "test_a_run_that_a_callback_ended_stays_ended test_history_of_a_resumed_run_has_the_epochs_before test_every_entry_of_a_state_matters",
    ),
    Guarantee(
        "Signals are delayed, and ignored ones stay ignored",
        "Interrupts.__enter__",
        "test_ignored_signals_stay_ignored test_interrupts_serve_twice test_another_thread_leaves_handlers_alone test_a_second_signal_ends_a_validation_without_another_checkpoint test_a_signal_before_the_first_step_ends_the_run_there",
    ),
    Guarantee(
        "Handlers are put back, and the signal is raised again",
        "Interrupts.__exit__",
        "test_handlers_are_back_after_an_error_and_a_refusal test_interrupts_serve_twice test_a_signal_before_the_first_step_ends_the_run_there test_a_callback_may_call_it test_a_signal_in_the_callback_that_ends_the_run_is_saved",
    ),
    Guarantee(
        "A second signal stops at once",
        "Interrupts._receive",
        "test_a_second_signal_ends_a_validation_without_another_checkpoint test_a_signal_before_the_first_step_ends_the_run_there",
    ),
    Guarantee(
        "A second signal costs no checkpoint; the best weights come back whatever ends a run",
        "Epochs.finish",
        "test_a_second_signal_ends_a_validation_without_another_checkpoint test_a_signal_in_the_callback_that_ends_the_run_is_saved test_best_weights_are_back_after_an_interrupt test_best_epoch_is_restored_whatever_ends_the_run test_callback_that_returns_true_ends_the_run test_what_ended_the_run_is_printed test_an_image_that_fails_in_the_second_epoch_ends_the_run_with_a_checkpoint",
    ),
    Guarantee(
        "A gradient that is not finite is seen",
        "gradients_are_finite",
        "test_the_step_changes_nothing_and_the_message_says_where test_a_parameter_without_elements_is_looked_past",
    ),
    Guarantee(
        "A step that is not finite changes nothing; micro-batches add up",
        "training_step",
        "test_the_step_changes_nothing_and_the_message_says_where test_step test_overflow_skips_the_update_and_lowers_the_scale",
    ),
    Guarantee(
        "Batch norm's statistics are put back",
        "BufferCopies",
        "test_buffers_that_a_head_assigns_anew_are_put_back test_the_step_changes_nothing_and_the_message_says_where test_the_step_is_that_of_smaller_parts_from_the_start",
    ),
    Guarantee(
        "A pass that failed is undone, and the next has the same random numbers",
        "guarded_step",
        "test_buffers_that_a_head_assigns_anew_are_put_back test_what_a_failed_step_leaves_does_not_reach_the_next test_the_step_is_that_of_smaller_parts_from_the_start test_no_room_for_the_optimizers_state_changes_nothing test_micro_batches_give_the_update_of_the_batch",
    ),
    Guarantee(
        "Steps that are skipped are counted and have a limit",
        "_train_batch",
        "test_the_budget_holds_over_a_run test_it_is_counted_and_printed_and_the_schedule_moves_with_the_updates test_a_limit_that_is_met_in_a_later_step test_what_was_left_out_is_remembered_over_a_stop test_schedule_spans_each_fit test_dropout_follows_the_seed test_a_scale_that_collapses_is_an_error",
    ),
    Guarantee(
        "A gradient scale that collapses is an error",
        "check_scale",
        "test_a_scale_that_collapses_is_an_error test_fp16_training_goes_on_after_overflow",
    ),
    Guarantee(
        "A fused step is made only where it may be",
        "step_where",
        "test_a_fused_step_is_made_only_where_it_may test_the_step_changes_nothing_and_the_message_says_where",
    ),
    Guarantee(
        "Memory that runs out halves the micro-batch; other errors pass",
        "within_memory",
        "test_other_errors_pass_unchanged test_one_image_that_does_not_fit_is_an_error_that_changes_nothing test_the_step_is_that_of_smaller_parts_from_the_start test_what_a_failed_step_leaves_does_not_reach_the_next",
    ),
    Guarantee(
        "The optimizer's step is never made twice",
        "update_not_repeated",
        "test_no_room_for_the_optimizers_state_changes_nothing test_the_optimizers_own_step_is_never_made_twice test_other_errors_pass_unchanged",
    ),
    Guarantee(
        "Memory for the optimizer's state is asked for first",
        "reserve_state",
        "test_no_room_for_the_optimizers_state_changes_nothing test_an_optimizer_that_keeps_nothing_needs_no_room",
    ),
    Guarantee(
        "Frozen parameters do not train",
        "freeze_until",
        "test_freezing test_20_steps",
    ),
    Guarantee(
        "Best weights come back",
        "BestWeights",
        "test_best",
    ),
    Guarantee(
        "Truncation is not hidden, and a failure names its file",
        "Samples.read",
        "test_a_guests_LOAD_TRUNCATED_IMAGES_does_not_hide_truncation test_a_16_bit_gray_file_is_refused test_a_file_that_cannot_be_read_is_named_by_path_and_index test_whatever_a_data_set_raises_becomes_one_error test_predict_takes_images_alone test_random_transforms_of_a_data_set_follow_the_seed",
    ),
    Guarantee(
        "EXIF rotations are undone; bombs and 16 bits are refused",
        "upright_rgb",
        "test_a_turned_photograph_comes_out_upright test_a_16_bit_gray_file_is_refused test_a_decompression_bomb_is_refused",
    ),
    Guarantee(
        "Images in a folder are read by this library's rules",
        "_from_folder",
        "test_a_16_bit_gray_file_is_refused test_a_turned_photograph_comes_out_upright test_a_data_set_that_draws_its_images_itself_names_the_failure test_target_transform_is_applied_before_targets_are_judged test_every_kind_of_data_gives_the_same_evaluation test_bad_images",
    ),
    Guarantee(
        "The path is in the message",
        "path_of",
        "test_the_message_has_path_and_index_through_subsets_and_concatenations test_attributes_that_only_look_known_do_not_hide_the_failure test_a_file_that_cannot_be_read_is_named_by_path_and_index",
    ),
    Guarantee(
        "Bad images have a limit",
        "without_bad_images",
        "test_one_in_a_hundred_may_be_bad_and_no_more test_one_image_may_always_be_bad_and_two_of_few_not test_data_without_a_good_image_is_refused test_skipping_does_not_reach_a_loader test_images_in_memory_are_not_looked_through test_a_run_that_skips_is_a_run_without_the_image",
    ),
    Guarantee(
        "Classes of both folders are compared",
        "check_same_classes",
        "test_folders_whose_classes_differ_are_refused test_a_folder_to_validate_on_that_lacks_a_class_is_refused",
    ),
    Guarantee(
        "Several ranks are refused",
        "_check_alone",
        "test_training_is_refused_in_every_rank_before_a_step test_a_world_of_one_trains",
    ),
    Guarantee(
        "Workers leave signals to the main process, and end with it",
        "_serve",
        "test_workers_leave_signals_to_the_main_process test_a_normal_end_leaves_no_worker test_workers_read_the_same_batches test_an_image_that_cannot_be_sent_does_not_hang_in_silence test_a_worker_that_dies_or_hangs_is_one_error_in_time test_workers_end_when_the_main_process_is_killed",
    ),
    Guarantee(
        "A worker that dies is one error, and none is left",
        "read_in_workers",
        "test_workers_read_the_same_batches test_a_normal_end_leaves_no_worker test_leaving_steps_in_the_middle_leaves_no_worker test_a_worker_that_dies_or_hangs_is_one_error_in_time",
    ),
    Guarantee(
        "The image that a worker was reading is named",
        "workers:_describe",
        "test_a_worker_that_dies_or_hangs_is_one_error_in_time",
    ),
    Guarantee(
        "A cached file is verified before it is opened",
        "download",
        "test_a_payload_in_the_place_of_a_file_never_runs test_a_good_copy_needs_no_server test_the_folder_is_torch_hubs_by_default test_a_name_without_hash_is_refused_before_anything_is_fetched",
    ),
    Guarantee(
        "A download is verified before it is kept",
        "_copy_verified",
        "test_a_login_page_is_refused test_a_file_is_downloaded_into_the_folder test_a_body_cut_short_is_a_download_error test_a_server_that_answers_nonsense_is_one_error test_without_a_length_a_short_body_is_not_kept",
    ),
    Guarantee(
        "Every byte of a file of features is verified",
        "FeatureFile.read",
        "test_no_flipped_bit_is_read_in_silence test_feature_file",
    ),
    Guarantee(
        "A file of features is for its layers, shape and dtype",
        "open_features",
        "test_a_renamed_file_is_not_taken_for_another test_feature_file test_no_flipped_bit_is_read_in_silence test_a_first_page_that_somebody_else_wrote_is_refused",
    ),
    Guarantee(
        "A file of features is written whole or not at all",
        "write_features",
        "test_feature_file test_a_disk_without_room_leaves_features_in_memory",
    ),
    Guarantee(
        "Images are known by every pixel",
        "image_digests",
        "test_equal_images_have_equal_digests_however_they_come test_pixels_shape_and_dtype_count test_images_of_differing_sizes",
    ),
    Guarantee(
        "A changed layer is noticed",
        "Prefix.is_current",
        "test_prefix test_cache_notices",
    ),
    Guarantee(
        "Only layers whose output depends on their input alone are cached",
        "pure_prefix",
        "test_prefix test_cache_notices",
    ),
    Guarantee(
        "Cached features train as the whole model does, and never longer than they are valid",
        "Feed.open",
        "test_what_is_cached_is_told_once test_an_impure_prefix_is_told_once test_true_raises_where_auto_trains_without test_a_change_in_a_callback test_without_the_cache_nothing_is_hashed test_views_are_cached_and_used_in_turn test_same_run_with_validation_in_several_batches",
    ),
    Guarantee(
        "lr_find leaves weights, optimizer and modes as they were",
        "unchanged",
        "test_lr_find_changes_nothing test_nothing_changes_when_it_is_ended test_batch_norm_stays test_a_mixture_of_modes_stays test_gradients_of_the_users_own_stay_and_do_not_count test_buffers_that_are_not_saved_stay test_the_gradient_scale_stays test_shared_state_of_an_optimizer_stays",
    ),
    Guarantee(
        "A checkpoint holds what other callbacks did",
        "CallbackList",
        "test_a_checkpoint_holds_what_gradual_unfreezing_did test_callbacks test_a_callback_adds_a_figure test_a_save_that_fails_is_a_warning_and_an_error_at_the_end test_nothing_is_saved_without_a_checkpoint",
    ),
    Guarantee(
        "A search trains copies",
        "search:_build",
        "test_the_backbone_is_never_changed test_builds_that_cannot_be_used_are_refused test_names_go_where_they_belong test_a_trial_is_a_fit_by_hand",
    ),
    Guarantee(
        "The best model is that of the best parameters",
        "search:search",
        "test_with_ties_the_model_is_that_of_the_best_parameters test_features_are_computed_once_for_all_trials test_files_are_read_once test_other_classes_to_validate_on_are_refused test_image_sizes_may_be_tried test_trials_run_from_shallow_to_deep test_impossible_spaces_are_refused test_a_grid_is_every_combination_in_its_order",
    ),
    Guarantee(
        "Figures for a bar are read once in a while",
        "Bar.advance",
        "test_figures_are_read_once_in_a_while test_a_bar_is_drawn_and_wiped",
    ),
    Guarantee(
        "Random numbers are put back",
        "seeded",
        "test_randomness",
    ),
)
