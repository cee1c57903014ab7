"""The public preference sets and formats that `load_preferences` knows, by name."""

from .columns import COLUMNS
from .conversations import LLAVA_HUMAN_PREFERENCE, POVID, WILDVISION_BATTLE
from .formats import LLAMAFACTORY, MS_SWIFT
from .judged import LLAVA_CRITIC, R1_REWARD_RL
from .single_turn import MM_RLHF, MMPR, RLAIF_V, RLHF_V, SPA_VL
from .source import Adapter, Source
from .t2i_formats import LLAVA_REWARD, PER_ANSWER_IMAGES, T2I
from .t2i_groups import EVALMUSE, HPDV2_TEST, IMAGEREWARD, IMAGEREWARD_RANKINGS
from .t2i_pairs import HPDV2_TRAIN, HPDV3, IMAGEREWARD_PAIRS, PICKAPIC_V2, RAPIDATA
from .trl_rows import TRL
from .vlfeedback import VLFEEDBACK


__all__ = ["SOURCES", "Adapter", "Source"]

# Every public set and format that `load_preferences` knows, by its name there.
SOURCES: dict[str, Source] = {
    # Answers about images.
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
    # Images made from captions.
    "evalmuse": EVALMUSE,
    "hpdv2": HPDV2_TRAIN,
    "hpdv2_test": HPDV2_TEST,
    "hpdv3": HPDV3,
    "imagereward": IMAGEREWARD,
    "imagereward_pairs": IMAGEREWARD_PAIRS,
    "imagereward_rankings": IMAGEREWARD_RANKINGS,
    "pickapic_v2": PICKAPIC_V2,
    "rapidata": RAPIDATA,
    # Formats.
    "columns": COLUMNS,
    "dt2it_t2i": PER_ANSWER_IMAGES,
    "llamafactory": LLAMAFACTORY,
    "llava_reward": LLAVA_REWARD,
    "ms_swift": MS_SWIFT,
    "omnireward_t2i": PER_ANSWER_IMAGES,
    "t2i": T2I,
    "trl": TRL,
}
