"""DeepSeek-V2: DeepSeek-V2-Lite's layers, larger, with compressed queries and device-limited routing.

It was neither compiled for a pod nor trained here.
"""

from moe.configs import published

get_config = published.config_of("deepseek_v2")
