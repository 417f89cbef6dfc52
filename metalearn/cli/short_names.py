"""Imported so that configs can name their classes by short names."""
# ruff: noqa: F401

import metalearn.estimators.evolution
import metalearn.estimators.forward
import metalearn.estimators.implicit
import metalearn.estimators.recurrent
import metalearn.estimators.unrolled
import metalearn.losses.learned
import metalearn.losses.network
import metalearn.losses.standard
import metalearn.losses.taylor
import metalearn.models.recurrent
import metalearn.models.transformer
import metalearn.models.vision
import metalearn.multilevel.reweighting
import metalearn.optim.first_order
import metalearn.problems.data_weights
import metalearn.problems.distillation
import metalearn.problems.few_shot
import metalearn.problems.hyperparameters
import metalearn.problems.learned_loss
import metalearn.problems.opaque
import metalearn.problems.schedules
import metalearn.problems.toys
import metalearn.tasks.images
import metalearn.tasks.sources
import metalearn.tasks.synthetic
import metalearn.training.data
import metalearn.training.in_context
import metalearn.training.loss_search
import metalearn.training.loss_tuning
import metalearn.training.meta_gradient
import metalearn.training.multilevel
