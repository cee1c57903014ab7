from .collator import MultimodalPreferenceCollator as MultimodalPreferenceCollator
from .models.modeling import load_reward_model as load_reward_model
from .reward_config import MultimodalRewardConfig as MultimodalRewardConfig
from .reward_trainer import MultimodalRewardTrainer as MultimodalRewardTrainer
from .scoring import RewardScorer as RewardScorer
from .token_counts import token_counter as token_counter

__version__: str
