// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
//
// Attributes and methods of many objects of one type, looked up once.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace fusestep::bindings {

inline pybind11::object attribute(PyObject* owner, PyObject* name) {
  auto value = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(owner, name));
  if (!value) throw pybind11::error_already_set();
  return value;
}

/// What a name means for the objects of a type. `Descriptor` is the struct of `DescriptorType`:
/// Python's own for what is written in C, as torch's is.
template <typename Descriptor, PyTypeObject& DescriptorType>
class FoundInType {
 public:
  /// `name` is kept by the caller.
  explicit FoundInType(PyObject* name) : name_(name) {}
  PyObject* name() const { return name_; }
  /// Null where the type has something else by that name, or its own way to look it up.
  const Descriptor* of(PyTypeObject* type) {
    if (reinterpret_cast<PyObject*>(type) != type_.ptr()) find(type);
    return found_;
  }

 private:
  void find(PyTypeObject* type) {
    auto* const as_object = reinterpret_cast<PyObject*>(type);
    pybind11::object meaning = attribute(as_object, name_);  // may throw: then nothing is changed
    const bool is_it =
        type->tp_getattro == PyObject_GenericGetAttr && Py_IS_TYPE(meaning.ptr(), &DescriptorType);
    found_ = is_it ? reinterpret_cast<const Descriptor*>(meaning.ptr()) : nullptr;
    std::swap(meaning_, meaning);
    type_ = pybind11::reinterpret_borrow<pybind11::object>(as_object);
  }

  PyObject* name_;
  pybind11::object type_, meaning_;
  const Descriptor* found_ = nullptr;
};

class AttributeOf {
 public:
  explicit AttributeOf(PyObject* name) : getter_(name) {}
  pybind11::object operator()(PyObject* owner) {
    const PyGetSetDescrObject* const getter = getter_.of(Py_TYPE(owner));
    if (getter == nullptr) return attribute(owner, getter_.name());
    auto value = pybind11::reinterpret_steal<pybind11::object>(
        getter->d_getset->get(owner, getter->d_getset->closure));
    if (!value) throw pybind11::error_already_set();
    return value;
  }

 private:
  FoundInType<PyGetSetDescrObject, PyGetSetDescr_Type> getter_;
};

/// Of a method without arguments, of the type and not of one object: whether it returns True.
class AnswerOf {
 public:
  explicit AnswerOf(PyObject* name) : method_(name) {}
  bool operator()(PyObject* owner) {
    const PyMethodDescrObject* const method = method_.of(Py_TYPE(owner));
    const bool is_direct = method != nullptr && method->d_method->ml_flags == METH_NOARGS;
    const auto answer = pybind11::reinterpret_steal<pybind11::object>(
        is_direct ? method->d_method->ml_meth(owner, nullptr)
                  : PyObject_CallMethodNoArgs(owner, method_.name()));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() == Py_True;
  }

 private:
  FoundInType<PyMethodDescrObject, PyMethodDescr_Type> method_;
};

}  // namespace fusestep::bindings
