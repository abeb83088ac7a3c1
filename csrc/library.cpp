// The schemas of every tensor op of cosmo_fast, once. Implementations register themselves by device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cosmo_fast, m) {
  m.def(
      "vocab_stats(Tensor logits, Tensor targets, Tensor? temperature, float softcap) -> (Tensor logp, Tensor entropy, "
      "Tensor other_max, Tensor other_sum)");
  m.def(
      "vocab_grad_(Tensor(a!) logits, Tensor? rows, Tensor targets, Tensor logp, Tensor entropy, Tensor other_max, "
      "Tensor other_sum, Tensor c_logp, Tensor? c_entropy, Tensor? temperature, float softcap) -> ()");
  m.def("add_transposed_(Tensor(a!) out, Tensor x) -> ()");
  m.def("group_advantages(Tensor rewards, Tensor groups, int scale, float epsilon, float weight_cap) -> Tensor");
  m.def(
      "vocab_kl_(Tensor(a!) logits, Tensor(b!) other, Tensor? coefficient, Tensor? temperature, float softcap, "
      "float other_softcap, float beta, bool wanted, bool other_wanted) -> Tensor kl");
  m.def("prefix_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "prefix_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments, "
      "float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor scale)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, bool weight_wanted) -> (Tensor dx, Tensor "
      "dweight)");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q, Tensor k)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("vision_greedy(Tensor features, Tensor counts, Tensor keep, Tensor? text) -> Tensor");
  m.def(
      "vision_attention(Tensor query, Tensor key, Tensor lse, Tensor counts, Tensor query_counts, float scale) -> "
      "Tensor");
  m.def("vision_squares(Tensor x, Tensor back) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
}
