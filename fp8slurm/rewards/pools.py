"""A reward for each data source."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import SampleGroup
from fp8slurm.rewards.pool import RewardPool


class RewardPools:
    """A RewardPool for every kind of reward; errors as RewardPool's."""

    def __init__(self, reward: RewardSection, kinds: Mapping[str, str], workers: int) -> None:
        """kinds: of each source, by Prompt.source; reward: everything else. workers: of each kind."""
        self._kinds = dict(kinds)
        self._pools: dict[str, RewardPool] = {}
        try:
            for kind in dict.fromkeys([*kinds.values()] or [reward.kind]):
                self._pools[kind] = RewardPool(reward.model_copy(update={"kind": kind}), workers)
        except BaseException:
            self.close()
            raise

    @property
    def failures(self) -> int:
        """Calls that failed since the start and counted as 0."""
        return sum(pool.failures for pool in self._pools.values())

    def score(self, groups: list[SampleGroup], heartbeat: Callable[[], None] = lambda: None) -> None:
        """As RewardPool.score, each group by the reward of its source."""
        for kind, pool in self._pools.items():
            pool.score([g for g in groups if self._kinds[g.prompt.source] == kind], heartbeat)

    def takes_groups(self, source: str) -> bool:
        """Whether the reward of this source is of all samples of a prompt at once."""
        return self._pools[self._kinds[source]].takes_groups if self._kinds else False

    def close(self) -> None:
        """End the children."""
        for pool in self._pools.values():
            pool.close()
