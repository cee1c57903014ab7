from .cluster import on_ray as on_ray
from .cluster import score_dataset as score_dataset
