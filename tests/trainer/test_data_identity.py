"""What an SFT checkpoint's number of steps is a position in."""

import numpy as np

from hone.config.recipe import SftSection
from hone.trainer.data import Conversations
from hone.trainer.sft import data_identity


def conversations() -> Conversations:
    return Conversations(
        token_ids_N=np.arange(4, dtype=np.int32),
        trains_N=np.ones(4, dtype=bool),
        lengths_S=np.array([2, 2], dtype=np.int32),
        num_too_long=0,
        num_without_answer=0,
    )


def test_another_seed_or_number_of_epochs_is_another_sequence_of_batches() -> None:
    identities = [
        data_identity(conversations(), SftSection(num_conversations=2, epochs=epochs), seed)
        for epochs, seed in ((1.0, 0), (2.0, 0), (1.0, 1))
    ]
    assert identities[0] not in identities[1:]
    assert identities[0] == data_identity(conversations(), SftSection(num_conversations=2), 0)
