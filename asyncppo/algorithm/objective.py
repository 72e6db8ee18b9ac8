"""Which policy loss: every variant is a switch of the one path `policy_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from asyncppo.algorithm._checks import check_choice

RATIOS = ("token", "sequence", "prefix-min")
TRUSTS = ("clip", "divergence")
BEHAVIOUR_MODES = ("mask", "clamp", "none")
BEHAVIOUR_LEVELS = ("token", "sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The switches of `policy_loss`; its docstring has the equations. The defaults are decoupled PPO.

    Attributes:
        clip_low: ε_lo in [0, 1].
        clip_high: ε_hi >= 0.
        dual_clip: c > 1, or None for no dual clip.
        ratio: "token" (PPO), "sequence" (GSPO) or "prefix-min" (MinPRO).
        trust: "clip", or "divergence" (DPPO; the two clips are then not read).
        divergence_limit: δ > 0, a difference of probabilities; at 1 or above it never binds. DPPO's authors run the
            binary total variation with 0.15. Read by "divergence" only.
        behaviour_mode: what becomes of w above the cap: "mask", "clamp", or "none" for w = 1.
        behaviour_cap: the largest w, > 0.
        behaviour_level: "token", or "sequence": w and the cap are those of the whole response.
        entropy_coef: β >= 0.
        kl_coef: the weight of KL(current ‖ reference), >= 0; above 0 it needs the reference's log-probs.

    Raises:
        ValueError: an unknown choice, a number out of its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    trust: str = "clip"
    divergence_limit: float = 0.15
    behaviour_mode: str = "mask"
    behaviour_cap: float = 5.0
    behaviour_level: str = "token"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        check_choice("ratio", self.ratio, RATIOS)
        check_choice("trust", self.trust, TRUSTS)
        check_choice("behaviour_mode", self.behaviour_mode, BEHAVIOUR_MODES)
        check_choice("behaviour_level", self.behaviour_level, BEHAVIOUR_LEVELS)
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"clip_low: expected a number in [0, 1], got {self.clip_low}")
        if not self.clip_high >= 0.0:
            raise ValueError(f"clip_high: expected a number >= 0, got {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip: expected a number above 1 or None, got {self.dual_clip}")
        if not self.divergence_limit > 0.0:
            raise ValueError(f"divergence_limit: expected a number above 0, got {self.divergence_limit}")
        if not self.behaviour_cap > 0.0:
            raise ValueError(f"behaviour_cap: expected a number above 0, got {self.behaviour_cap}")
        if not self.entropy_coef >= 0.0:
            raise ValueError(f"entropy_coef: expected a number >= 0, got {self.entropy_coef}")
        if not self.kl_coef >= 0.0:
            raise ValueError(f"kl_coef: expected a number >= 0, got {self.kl_coef}")
