"""The public preference sets and formats that `load_preferences` knows, by name.

To add a set, such as `my_set`:

1. Write its adapter, in the module of the sets that are most like it. An adapter is a generator that takes a row as
   the source has it and yields a [`preference`] or a [`t2i_pair`]. Its keyword arguments are options of
   `load_preferences`. For a pair that cannot be used it raises a [`RowError`] with a reason, or yields the error if
   the row holds other pairs too. `fields` reads what sets have in common.
2. Describe the set below the adapter: `MY_SET = Source(my_set, licence=..., hub_id=..., reads=(...))`. Fields that
   are not in `reads` stay columns.
3. Enter it here by its name. Identity, paths, frames, checks and the quarantine are the loader's.
4. Put sample rows into `tests/data/fixtures`. State in a test the expected value of each of their fields, and a row
   for each reason. Add the set to the table in `docs/data.md`.
"""

from . import formats, judged, t2i, trl_rows
from .fields import Adapter, Source


__all__ = ["SOURCES", "Adapter", "Source"]

# Every known set and format by its name: data sets, then formats that any file may have.
SOURCES: dict[str, Source] = {
    # Answers about images
    "llava_critic": judged.LLAVA_CRITIC,
    "llava_human_preference": formats.LLAVA_HUMAN_PREFERENCE,
    "mm_rlhf": judged.MM_RLHF,
    "mmpr": judged.MMPR,
    "povid": formats.POVID,
    "r1_reward_rl": judged.R1_REWARD_RL,
    "rlaif_v": judged.RLAIF_V,
    "rlhf_v": judged.RLHF_V,
    "spa_vl": judged.SPA_VL,
    "vlfeedback": judged.VLFEEDBACK,
    "wildvision_battle": formats.WILDVISION_BATTLE,
    # Images made from captions
    "evalmuse": t2i.EVALMUSE,
    "hpdv2": t2i.HPDV2_TRAIN,
    "hpdv2_test": t2i.HPDV2_TEST,
    "hpdv3": t2i.HPDV3,
    "imagereward": t2i.IMAGEREWARD,
    "imagereward_pairs": t2i.IMAGEREWARD_PAIRS,
    "imagereward_rankings": t2i.IMAGEREWARD_RANKINGS,
    "pickapic_v2": t2i.PICKAPIC_V2,
    "rapidata": t2i.RAPIDATA,
    # Formats
    "columns": trl_rows.COLUMNS,
    "dt2it_t2i": t2i.PER_ANSWER_IMAGES,
    "llamafactory": formats.LLAMAFACTORY,
    "llava_reward": t2i.LLAVA_REWARD,
    "ms_swift": formats.MS_SWIFT,
    "omnireward_t2i": t2i.PER_ANSWER_IMAGES,
    "t2i": t2i.T2I,
    "trl": trl_rows.TRL,
}
