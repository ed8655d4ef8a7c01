"""What comes over the network for a merge of models on the Hub, said beforehand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Travel:
    """Bytes of the bodies of what the Hub sends. Resumed, a merge takes less; failures are sent again.

    Attributes:
        opened: headers, indexes, configs and file lists, which the plan itself has fetched.
        fingerprints: samples of every tensor.
        downloads: whole weight files, into the Hub's cache, once.
        fisher, calibration, survey, merge: of weights that are streamed, as often as they are read.
        files: tokenizer, licence and the like.
        size: of the weights of all models on the Hub, once.
        at_most: whether it may be less, because a pass may turn out not to be needed or a text to have fewer tokens.
    """

    opened: int
    fingerprints: int
    downloads: int
    fisher: int
    calibration: int
    survey: int
    merge: int
    files: int
    size: int
    at_most: bool

    @property
    def streamed(self) -> int:
        return self.fisher + self.calibration + self.survey + self.merge

    @property
    def total(self) -> int:
        """All that the merge will fetch, what the plan has fetched (and the merge will again) included."""
        return self.opened + self.fingerprints + self.downloads + self.streamed + self.files
