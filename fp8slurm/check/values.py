"""Numbers that cannot be meant, and numbers that are merely unusual: mostly a wrong unit or a slip of a power of ten.

Each bound has its reason beside it. What cannot be meant is refused before anything is queued; what may be meant is a
warning. A run that was begun with a number goes on with it.
"""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.config.bounds import HOTTEST, USUAL_HEAT

ADAM_LR = 0.1
"""Adam moves a weight by about the learning rate in a step, and trained weights are about 0.02: at this rate one step
overwrites all of them several times over."""
USUAL_RL_LR, USUAL_SFT_LR = 1e-3, 1e-2
"""Ten times what the tiny models of this package train with; published runs of real models have 1e-7 to 1e-4."""
LEAST_LR = 1e-10
"""Masters are FP32: half a unit in the last place of a weight of 0.02 is 9e-10, so that smaller steps are rounded
away."""
WIDEST_CLIP = 10.0
"""A ratio of 11: no token of a run that learns gets there, and 20 and 28 are 0.2 and 0.28 in percent."""
USUAL_COEF = 1.0
"""Weight of a KL or entropy term against a policy loss whose advantages are about 1."""
SHORTEST_S = {"engine.ready_timeout_s": 10.0, "engine.request_timeout_s": 30.0, "watchdog.timeout_s": 20.0}
"""Importing SGLang alone takes 4 s of CPU time; what is below these was meant in minutes or hours."""
LONGEST_CALL_S = 600.0
LEAST_GAP = 1e-4
"""Nats: a seventh of the smallest mean gap in docs/gpu.md, that of a tiny model in BF16."""


def unmeant(config: RunConfig) -> list[str]:
    """Why values of these settings cannot be meant, each naming the flag, the value and what is allowed."""
    a, o, r, e, s = config.algorithm, config.optim, config.rollout, config.eval, config.sft
    rl, sft = config.run.steps > 0, s.data is not None
    adam = "Adam moves every weight by about so much in a step, and weights are about 0.02"
    found = {
        f"--optim.lr {o.lr:g}: {adam}; allowed: below {ADAM_LR:g}, commonly 1e-7 to 1e-4": rl and o.lr >= ADAM_LR,
        f"--sft.lr {s.lr:g}: {adam}; allowed: below {ADAM_LR:g}, commonly 1e-6 to 1e-3": sft and s.lr >= ADAM_LR,
        f"--optim.weight-decay {o.weight_decay:g} with --optim.lr {o.lr:g}: a step takes lr times so much off every "
        f"weight, more than there is; allowed: below {1 / o.lr:g}": rl and o.weight_decay * o.lr >= 1,
        f"--algorithm.clip-low {a.clip_low:g}: the ratio is clipped below 1 - clip_low, and is never negative; "
        f"allowed: 0 to 1 (1 leaves that side open), commonly 0.2": rl and a.clip_low > 1,
        f"--algorithm.tis-cap {a.tis_cap:g}: a cap below 1 cuts the weight of tokens on which trainer and engine "
        f"agree; allowed: 1 or more, or 0 (off)": rl and 0 < a.tis_cap < 1,
        f"--rollout.temperature {r.temperature:g}: samples would be nearly random tokens; allowed: up to "
        f"{HOTTEST:g}, commonly 1": rl and r.temperature > HOTTEST,
        f"--eval.temperature {e.temperature:g}: answers would be nearly random tokens; allowed: up to "
        f"{HOTTEST:g}, commonly 0 (greedy) to 1": e.temperature > HOTTEST,
    }
    return [text for text, applies in found.items() if applies] + _small_cache(config)


def _small_cache(config: RunConfig) -> list[str]:
    """A KV cache that no longest sequence fits into: SGLang would cut its response without a word."""
    cache, prompt = config.engine.max_total_tokens, config.data.max_prompt_tokens
    lengths = {"rollout": config.rollout.max_tokens if config.run.steps else None, "eval": config.eval.max_tokens}
    return [
        f"--engine.max-total-tokens {cache}: the KV cache has no room for one sequence of --data.max-prompt-tokens "
        f"{prompt} + --{key}.max-tokens {response} = {prompt + response} tokens; allowed: that or more, or leave it out"
        for key, response in lengths.items()
        if cache is not None and response is not None and prompt + response > cache
    ]


def unusual(config: RunConfig) -> list[str]:
    """Warnings about values that somebody may mean."""
    a, o, r, e, s = config.algorithm, config.optim, config.rollout, config.eval, config.sft
    steps, rl, sft = config.run.steps, config.run.steps > 0, config.sft.data is not None
    low, high = USUAL_HEAT
    found = {
        f"optim.lr {o.lr:g}: large models are trained with 1e-7 to 1e-4": rl and USUAL_RL_LR < o.lr < ADAM_LR,
        f"optim.lr {o.lr:g}: steps so small are rounded away in FP32 weights of 0.02": rl and o.lr < LEAST_LR,
        f"sft.lr {s.lr:g}: large models are trained with 1e-6 to 1e-4": sft and USUAL_SFT_LR < s.lr < ADAM_LR,
        f"optim.beta1 {o.beta1:g} with optim.beta2 {o.beta2:g}: Adam's convergence asks for a beta1 below the square "
        f"root of beta2 (Reddi et al. 2018)": o.beta1 > o.beta2**0.5,
        f"algorithm.clip_high {a.clip_high:g} leaves ratios up to {1 + a.clip_high:g} as they are; in percent it would "
        f"be {a.clip_high / 100:g}": rl and a.clip_high > WIDEST_CLIP,
        f"algorithm.clip_low {a.clip_low:g} and algorithm.clip_high {a.clip_high:g}: 0 does not switch a bound off, it "
        f"clips at a ratio of 1": rl and a.loss != "gspo" and 0 in (a.clip_low, a.clip_high),
        f"algorithm.kl_coef {a.kl_coef:g} outweighs the policy's loss": rl and a.kl_coef > USUAL_COEF,
        f"algorithm.entropy_coef {a.entropy_coef:g} outweighs the policy's loss": rl
        and abs(a.entropy_coef) > USUAL_COEF,
        f"rollout.temperature {r.temperature:g}: samples are nearly greedy or nearly random; 1 is common, and what the "
        f"trainer's log-probabilities are of": rl and not low <= r.temperature <= high and 0 < r.temperature <= HOTTEST,
        f"eval.temperature {e.temperature:g}: answers are nearly random": high < e.temperature <= HOTTEST,
        f"rollout.max_gap {r.max_gap or 0:g}: gaps of runs that are not exact have been 7e-4 nats and more, so the "
        f"first step would end this one": rl and not config.model.exact and 0 < (r.max_gap or 0) < LEAST_GAP,
        f"sft.eval_from {s.eval_from} of sft.max_steps {s.max_steps}: the supervised phase is never evaluated": (
            sft and s.eval_every and s.eval_from > s.max_steps
        ),
        f"rollout.save_every {r.save_every} of run.steps {steps}: no rollout is kept": rl and r.save_every > steps,
        f"reward.timeout_s {config.reward.timeout_s:g}: these are seconds, for one answer": (
            config.reward.timeout_s > LONGEST_CALL_S
        ),
    }
    for name, least in SHORTEST_S.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        found[f"{name} {value:g}: these are seconds, and a start, a request or a step takes longer"] = value < least
    return [text for text, applies in found.items() if applies]
