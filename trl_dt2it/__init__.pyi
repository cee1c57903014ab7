from .models.modeling import load_reward_model as load_reward_model
from .scoring.scorer import RewardScorer as RewardScorer
from .training.batching import token_counter as token_counter
from .training.collator import MultimodalPreferenceCollator as MultimodalPreferenceCollator
from .training.config import MultimodalRewardConfig as MultimodalRewardConfig
from .training.trainer import MultimodalRewardTrainer as MultimodalRewardTrainer

__version__: str
