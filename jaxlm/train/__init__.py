"""Training: a model fine-tuned on jsonl files, by several ways of tuning, resumable.

`run` does all of a run's `Config` from files; `fit` trains a bundle in memory; `continual` learns
tasks in turn; `rank_runs` orders runs by their first steps.
"""

from jaxlm.train.config import Config as Config
from jaxlm.train.config import Data as Data
from jaxlm.train.config import MeshSizes as MeshSizes
from jaxlm.train.config import Optimizer as Optimizer
from jaxlm.train.config import read_config as read_config
from jaxlm.train.ewc import Ewc as Ewc
from jaxlm.train.loop import Fitted as Fitted
from jaxlm.train.loop import fit as fit
from jaxlm.train.lora import Lora as Lora
from jaxlm.train.lora import OLora as OLora
from jaxlm.train.osft import Osft as Osft
from jaxlm.train.ranking import Ranking as Ranking
from jaxlm.train.ranking import rank_runs as rank_runs
from jaxlm.train.runs import run as run
from jaxlm.train.tasks import Course as Course
from jaxlm.train.tasks import Task as Task
from jaxlm.train.tasks import continual as continual
from jaxlm.train.tuning import Full as Full
from jaxlm.train.tuning import Tuning as Tuning
