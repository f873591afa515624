// One init function a topic; module.cpp calls them.
#pragma once

#include <nanobind/nanobind.h>

void init_attention(nanobind::module_& m);
void init_config(nanobind::module_& m);
void init_graph_manager(nanobind::module_& m);
void init_monitor(nanobind::module_& m);
