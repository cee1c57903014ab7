from .cluster import on_ray as on_ray
