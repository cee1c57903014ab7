"""The public preference sets and formats that `load_preferences` knows, by name.

To add a set, such as `my_set`:

1. Write its adapter, in the module of the sets that are most like it. An adapter is a generator that takes a row as
   the source has it and yields a [`preference`] or a [`t2i_pair`]. Its keyword arguments are options of
   `load_preferences`. For a pair that cannot be used it raises a [`RowError`] with a reason, or yields the error if
   the row holds other pairs too. `fields` reads what sets have in common.
2. Describe the set below the adapter: `MY_SET = Source(my_set, licence=..., hub_id=..., reads=(...))`. Fields that
   are not in `reads` stay columns.
3. Enter it here as `"my_set": MY_SET`. Identity, paths, frames, checks and the quarantine are the loader's.
4. Put sample rows into `tests/data/fixtures`. State in a test the expected value of each of their fields, and a row
   for each reason. Add the set to the table in `docs/data.md`.
"""

from .fields import Adapter, Source
from .formats import LLAMAFACTORY, LLAVA_HUMAN_PREFERENCE, MS_SWIFT, POVID, WILDVISION_BATTLE
from .judged import LLAVA_CRITIC, MM_RLHF, MMPR, R1_REWARD_RL, RLAIF_V, RLHF_V, SPA_VL, VLFEEDBACK
from .t2i import (
    EVALMUSE,
    HPDV2_TEST,
    HPDV2_TRAIN,
    HPDV3,
    IMAGEREWARD,
    IMAGEREWARD_PAIRS,
    IMAGEREWARD_RANKINGS,
    LLAVA_REWARD,
    PER_ANSWER_IMAGES,
    PICKAPIC_V2,
    RAPIDATA,
    T2I,
)
from .trl_rows import COLUMNS, TRL


__all__ = ["SOURCES", "Adapter", "Source"]

# Every known set and format by its name: data sets, then formats that any file may have.
SOURCES: dict[str, Source] = {
    # Answers about images
    "llava_critic": LLAVA_CRITIC,
    "llava_human_preference": LLAVA_HUMAN_PREFERENCE,
    "mm_rlhf": MM_RLHF,
    "mmpr": MMPR,
    "povid": POVID,
    "r1_reward_rl": R1_REWARD_RL,
    "rlaif_v": RLAIF_V,
    "rlhf_v": RLHF_V,
    "spa_vl": SPA_VL,
    "vlfeedback": VLFEEDBACK,
    "wildvision_battle": WILDVISION_BATTLE,
    # Images made from captions
    "evalmuse": EVALMUSE,
    "hpdv2": HPDV2_TRAIN,
    "hpdv2_test": HPDV2_TEST,
    "hpdv3": HPDV3,
    "imagereward": IMAGEREWARD,
    "imagereward_pairs": IMAGEREWARD_PAIRS,
    "imagereward_rankings": IMAGEREWARD_RANKINGS,
    "pickapic_v2": PICKAPIC_V2,
    "rapidata": RAPIDATA,
    # Formats
    "columns": COLUMNS,
    "dt2it_t2i": PER_ANSWER_IMAGES,
    "llamafactory": LLAMAFACTORY,
    "llava_reward": LLAVA_REWARD,
    "ms_swift": MS_SWIFT,
    "omnireward_t2i": PER_ANSWER_IMAGES,
    "t2i": T2I,
    "trl": TRL,
}
