"""Rewards of growing texts: checkers, outcome and process reward models, any Python callable."""

from jaxlm.rewards.base import Carry as Carry
from jaxlm.rewards.base import Prompts as Prompts
from jaxlm.rewards.base import Reward as Reward
from jaxlm.rewards.base import RewardError as RewardError
from jaxlm.rewards.base import Rows as Rows
from jaxlm.rewards.call import TextReward as TextReward
from jaxlm.rewards.check import StepChecker as StepChecker
from jaxlm.rewards.layout import PLAIN as PLAIN
from jaxlm.rewards.layout import Layout as Layout
from jaxlm.rewards.layout import qwen_layout as qwen_layout
from jaxlm.rewards.layout import rlhflow_layout as rlhflow_layout
from jaxlm.rewards.outcome import OutcomeReward as OutcomeReward
from jaxlm.rewards.outcome import score_answers as score_answers
from jaxlm.rewards.process import ProcessReward as ProcessReward
from jaxlm.rewards.process import process_reward as process_reward
from jaxlm.rewards.process_text import TextProcessReward as TextProcessReward
