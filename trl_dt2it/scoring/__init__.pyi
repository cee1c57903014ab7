from .scorer import RewardScorer as RewardScorer
from .server import check_server as check_server
