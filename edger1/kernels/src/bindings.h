// One function for each group of kernels that adds its Python functions to the extension.
#pragma once

#include <nanobind/nanobind.h>

namespace edger1 {

void bind_qmm(nanobind::module_& m);
void bind_pages(nanobind::module_& m);
void bind_ops(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_stack(nanobind::module_& m);
void bind_experts(nanobind::module_& m);
void bind_latent(nanobind::module_& m);
void bind_choose(nanobind::module_& m);
void bind_train(nanobind::module_& m);

} // namespace edger1
