"""One training step: its gradients against the textbook's, and equal steps computed in other ways."""

import warnings

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_heads
from torch._subclasses.fake_tensor import FakeTensorMode

import command_line
import data
import run_state
import training_step
import update
from benchmarks import textbook

# Widths with which each group of GroupNorm has several channels: the bias before a group of one has no gradient.
NO_ZERO_GRADIENTS = ("--width", "12", "--encoder-width", "12")


@pytest.fixture
def start(photos, tmp_path):
    """start(*flags) returns a new state with random heads, its constants and the images."""
    def new(*flags):
        c, _ = command_line.parse_constants(["--data", photos, *SMALL, *flags])
        state = run_state.new_state(c, command_line.choose_device(c.DEVICE))
        draw_heads(state.generator)
        return state, c, data.load_images(photos, 32, 3, tmp_path / "cache", workers=0, progress=False)
    return new


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def gradients_of_a_step(start, monkeypatch):
    """gradients_of_a_step(*flags) returns [{parameter: gradient}] of a step's updates in order, and its values."""
    found, apply_if_finite = [], update.apply_if_finite

    def keep(state, model, optimizer):
        found.append(gradients(model))
        apply_if_finite(state, model, optimizer)

    def compute(*flags):
        found.clear()
        values = training_step.training_step(*start(*flags))
        return found.copy(), {name: value.item() for name, value in values.items()}

    monkeypatch.setattr(update, "apply_if_finite", keep)
    return compute


def assert_equal_gradients(some, others, tolerance):
    """Compares the relative L2 norm of each parameter's difference. No gradient may be all zero."""
    assert len(some) == len(others) > 0
    for one, other in zip(some, others):
        assert list(one) == list(other)
        for name in one:
            assert one[name].norm() > 0, name
            assert (one[name] - other[name]).norm() <= tolerance * one[name].norm(), name


def weights(model):
    """Returns a copy of all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("flags", [(), ("--n-critic", "2"), ("--gp-every", "3", "--lambda-drift", "0.5")])
def test_the_gradients_of_a_whole_step_equal_the_textbooks(float64, start, gradients_of_a_step, flags):
    found, values = gradients_of_a_step(*NO_ZERO_GRADIENTS, *flags)

    state, c, image_set = start(*NO_ZERO_GRADIENTS, *flags)
    book, expected = textbook.like(state, c), []
    for critic_update in range(c.N_CRITIC):
        batch = training_step.draw_batch(book.draws, c, image_set, critic_update)
        critic_loss, critic_values = textbook.critic_loss(book, c, batch)
        textbook.apply(critic_loss, book.critic_optimizer)
        expected.append(gradients(book.critic))
    generator_loss, generator_values = textbook.generator_loss(book, c, batch)
    textbook.apply(generator_loss, book.generator_optimizer)
    expected.append(gradients(book.generator))

    assert_equal_gradients(found, expected, 1e-9)
    for name, value in {**critic_values, **generator_values}.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-9), name


@pytest.mark.parametrize("flags, others", [
    (("--micro-batch", "2"), ("--gp-every", "3")),
    (("--micro-batch", "1"), ("--gp-every", "3")),            # images 1 and 2 are micro-batches without a penalty
    (("--micro-batch", "2"), ("--n-critic", "2")),
    (("--recompute-activations", "--micro-batch", "2"), ())])
def test_saving_memory_changes_no_gradient(float64, gradients_of_a_step, flags, others):
    whole, values = gradients_of_a_step(*NO_ZERO_GRADIENTS, *others)
    saving, saving_values = gradients_of_a_step(*NO_ZERO_GRADIENTS, *others, *flags)
    assert_equal_gradients(whole, saving, 1e-10)
    assert saving_values == pytest.approx(values, rel=1e-10)


def test_recomputing_keeps_fewer_activations(start):
    def kept(*flags):
        state, c, image_set = start(*flags)
        batch, sizes = training_step.draw_batch(state, c, image_set, 0), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            training_step.generate(state.generator, batch)
        return sum(sizes)

    assert kept("--recompute-activations") < 0.7 * kept()


# ------------------------------------------------------------------------------------- randomness

def test_a_step_leaves_the_global_generators_alone(start):
    state, c, image_set = start("--flip")
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    training_step.training_step(state, c, image_set)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


def test_a_step_is_a_function_of_the_seed(start):
    after = []
    for seed in ("1", "1", "2"):
        torch.manual_seed(len(after))
        state, c, image_set = start("--seed", seed)
        training_step.training_step(state, c, image_set)
        after.append(weights(state.generator))
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])


def test_the_critic_sees_each_image_once_per_epoch_with_several_updates_per_step(start):
    state, c, image_set = start("--n-critic", "3")
    batches = [training_step.draw_batch(state, c, image_set, critic_update) for critic_update in range(3)]
    seen = torch.cat([batch.real for batch in batches]).flatten(1)
    assert len(seen.unique(dim=0)) == len(image_set.train) == 12
    assert len(torch.cat([batch.posterior_noise for batch in batches]).unique(dim=0)) == 12


# ------------------------------------------------------------------------------------- updates

def test_the_first_step_moves_weights_by_the_learning_rate_and_the_layer_by_its_share(start):
    state, c, image_set = start("--learning-rate", "1e-2", "--layer-rate", "0.5", "--critic-learning-rate", "1e-3")
    parts = state.generator.vae.from_z, state.generator.layer.to_tokens, state.critic.to_score
    before = [part.weight.detach().clone() for part in parts]
    training_step.training_step(state, c, image_set)
    moved = [(part.weight - old).abs().median().item() for part, old in zip(parts, before)]
    assert moved == pytest.approx([1e-2, 5e-3, 1e-3], rel=1e-3)


def test_an_update_that_is_not_finite_is_skipped_and_counted(start, monkeypatch):
    state, c, image_set = start()
    draw_batch = training_step.draw_batch

    def bad_batch(*arguments):
        batch = draw_batch(*arguments)
        batch.real[0, 0, 0, 0] = float("nan")
        return batch

    before = weights(state.critic), weights(state.generator)
    with monkeypatch.context() as patch:
        patch.setattr(training_step, "draw_batch", bad_batch)
        training_step.training_step(state, c, image_set)
    state.count_skipped()
    assert torch.equal(before[0], weights(state.critic)) and torch.equal(before[1], weights(state.generator))
    assert all(entry["step"] == 0 for entry in state.critic_optimizer.state.values())      # Adam's count too
    assert (state.counters["skipped_updates"], state.counters["skipped_in_a_row"]) == (2, 1)
    training_step.training_step(state, c, image_set)
    state.count_skipped()
    assert (state.counters["skipped_updates"], state.counters["skipped_in_a_row"]) == (2, 0)


@pytest.mark.parametrize("path", ["cpu", "cuda"])        # the operators of the CUDA path exist on the CPU too
def test_the_average_starts_as_a_copy_and_has_its_half_life(path, start):
    state, c, _ = start("--ema-half-life-kimg", "0.04", "--ema-ramp", "1e9")        # 40 images: 10 batches of 4
    for model, value in ((state.generator, 1.0), (state.ema, 0.0)):
        for p in model.parameters():
            p.data.fill_(value)
    state.device = torch.device(path)
    state.ema_weight.fill_(update.ema_weight(c, images=4, images_seen=4))
    for _ in range(10):
        update.update_ema(state)
    torch.testing.assert_close(weights(state.ema), torch.full_like(weights(state.ema), 0.5), atol=1e-5, rtol=0)
    state.ema_weight.fill_(update.ema_weight(c, images=4, images_seen=0))
    update.update_ema(state)
    assert torch.equal(weights(state.ema), weights(state.generator))


def test_both_updates_of_a_step_share_one_pass_of_the_generator(start, monkeypatch):
    state, c, image_set = start("--n-critic", "2")
    batch_sizes, decode = [], state.generator.vae.decode
    monkeypatch.setattr(state.generator.vae, "decode", lambda z: batch_sizes.append(len(z)) or decode(z))
    training_step.training_step(state, c, image_set)
    assert batch_sizes == [4, 4]                  # of the first critic update; of the second one and the generator's


def test_the_mean_deviation_is_that_of_torch():
    images = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(training_step.mean_deviation(images, 0), images.std(0, correction=0).mean())
    torch.testing.assert_close(training_step.mean_deviation(images.flatten(1), 1),
                               images.std((1, 2, 3), correction=0).mean())


def test_constant_alpha_trains_without_the_transformer(start):
    state, c, image_set = start("--alpha-span", "1")
    layer = state.generator.layer
    layer.transformer.forward = layer.encode = None                         # a call would fail
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), torch.tanh(3 * (2 * x - 1)))
    before = weights(layer)
    values = training_step.training_step(state, c, image_set)
    assert (values["alpha_min"], values["alpha_max"], values["alpha_spread"]) == (3, 3, 0)
    assert torch.equal(weights(layer), before) and all(p.grad is None for p in layer.parameters())


# ------------------------------------------------------------------------------------- precision, CUDA

def test_scores_gradient_norms_alpha_and_image_stay_float32_under_bfloat16_autocast(start):
    """With fake tensors, which have the dtypes that autocast gives them but compute nothing."""
    state, c, image_set = start("--gp-every", "1")
    batch, inside = training_step.draw_batch(state, c, image_set, 0), []
    for conv in (state.generator.vae.encoder[0][0], state.generator.layer.to_tokens, state.critic.blocks[0][0]):
        conv.register_forward_hook(lambda module, inputs, out: inside.append(out.dtype))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        generated = training_step.generate(state.generator, batch)
        score = state.critic(batch.real)
        (critic_loss, _), (penalty, logged) = training_step.critic_terms(state, c, batch)
    assert set(inside) == {torch.bfloat16}
    dtypes = {tensor.dtype for tensor in (*generated, score, critic_loss, penalty, logged["gradient_norm"])}
    assert dtypes == {torch.float32}


def test_the_cpu_does_not_use_autocast(start):
    state, c, _ = start()
    enabled = [torch.is_autocast_enabled("cpu") for _ in update.in_mixed_precision(state, c, iter([1, 2]))]
    assert enabled == [False, False]


def test_recorded_steps_are_dropped_with_the_rates_and_the_state_that_they_hold(start):
    state, c, _ = start()
    for change in (lambda: state.set_learning_rates(c), lambda: state.load_state_dict(state.state_dict())):
        state.graphs["kind"] = update.RecordedStep(training_step.apply_updates)
        change()
        assert not state.graphs


@pytest.mark.parametrize("images_seen, share", [(0, 1), (1000, 1), (2000, 0.525), (3000, 0.05), (9000, 0.05)])
@pytest.mark.parametrize("lr_scale", [1, 0.5])
def test_the_learning_rates_fall_linearly_with_the_images_seen(images_seen, share, lr_scale, start):
    state, c, image_set = start("--decay-from-kimg", "1", "--decay-to-kimg", "3", "--critic-learning-rate", "0.002")
    state.counters.update(images_seen=images_seen, lr_scale=lr_scale)
    training_step.training_step(state, c, image_set)
    rates = [group["lr"] for optimizer in (state.generator_optimizer, state.critic_optimizer)
             for group in optimizer.param_groups]
    assert rates == pytest.approx([lr_scale * share * rate for rate in (0.001, 0.0001, 0.002)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_reads_the_falling_learning_rates(start):
    moved = []
    for flags in ((), ("--decay-to-kimg", "0.001")):                    # at the end of the fall after one step
        state, c, image_set = start("--device", "cuda", *flags)
        for _ in range(update.RecordedStep.WARM_UP + 2):
            before = state.critic.to_score.weight.clone()
            training_step.training_step(state, c, image_set)
        moved.append((state.critic.to_score.weight - before).norm().item())
    assert moved[1] < 0.2 * moved[0]


@pytest.mark.parametrize("flags", [(), ("--flip",)])
def test_images_kept_on_the_device_give_the_same_batches(flags, start):
    state, c, image_set = start(*flags)
    expected = training_step.draw_batch(state, c, image_set, 0).real
    image_set.on_device = torch.from_numpy(np.array(image_set.images))
    assert torch.equal(training_step.draw_batch(state, c, image_set, 0).real, expected)


@pytest.mark.parametrize("share, kept", [(0.5, True), (0.4, False), (0, False)])
def test_images_are_kept_on_the_device_if_they_fit(share, kept, start, monkeypatch):
    _, _, image_set = start()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * image_set.images.nbytes, 10 ** 12))
    data.keep_on_device(image_set, torch.device("cpu"), share)
    assert (image_set.on_device is not None) == kept
    assert not kept or np.array_equal(image_set.on_device.numpy(), image_set.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts waits for a GPU")
def test_a_step_on_cuda_waits_for_the_device_at_most_once(start):
    state, c, image_set = start("--device", "cuda")
    for _ in range(update.RecordedStep.WARM_UP + 1):
        training_step.training_step(state, c, image_set)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training_step.training_step(state, c, image_set)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("flags", [(), ("--n-critic", "2"), ("--micro-batch", "2"),
                                   ("--recompute-activations",)])
def test_a_recorded_step_equals_a_plain_step(flags, start):
    """In full float32, so that only the order of sums differs."""
    ends = []
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        state, c, image_set = start("--device", "cuda", "--no-bfloat16", "--no-tf32", graph, *flags)
        update.set_up(state.device, c)
        origin = weights(state.generator)
        for _ in range(12):
            values = training_step.training_step(state, c, image_set)
        assert bool(state.graphs) == (graph == "--cuda-graph")
        ends.append((weights(state.generator) - origin, {name: value.item() for name, value in values.items()}))
    (moved, values), (plain_moved, plain_values) = ends
    assert (moved - plain_moved).norm() < 0.1 * plain_moved.norm()
    assert values == pytest.approx(plain_values, rel=0.05, abs=0.02)
