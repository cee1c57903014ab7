from .scorer import RewardScorer as RewardScorer
