# The first C++ block of README.md is readme_example.cpp, from the first line after its licence.
file(READ ${CMAKE_CURRENT_LIST_DIR}/readme_example.cpp example)
file(READ ${CMAKE_CURRENT_LIST_DIR}/../README.md readme)
string(FIND "${example}" "#include" begin)
string(SUBSTRING "${example}" ${begin} -1 example)
string(FIND "${readme}" "```cpp\n${example}```\n" found)
if(found EQUAL -1)
  message(FATAL_ERROR "README.md does not contain examples/readme_example.cpp as its C++ block")
endif()
