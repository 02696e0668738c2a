"""When, where and with whose approval. No mathematics and no file formats: the stages do the work."""

from graftline.workflow.environment import begin_flow_program

begin_flow_program()
