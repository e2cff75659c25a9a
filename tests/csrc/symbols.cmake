# SPDX-License-Identifier: Apache-2.0
# cmake -DNM=... -DISA=avx512 -DOBJECTS="a.o;b.o" -P symbols.cmake
# What an object of one instruction set defines must carry that set's namespace in its name. Anything else (an inline function
# of a shared header, a template of the standard library) could be chosen by the linker for the whole library and then
# crash older machines. The cells' constants are allowed: they are numbers, the same in every object.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --extern-only --format=posix ${object}
                  OUTPUT_VARIABLE out COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" lines "${out}")
  foreach(line IN LISTS lines)
    string(LENGTH "${ISA}" length)
    if(line MATCHES "^(_ZN8fusedrnn5cells[^ ]*|DW\\.ref\\.[^ ]*) [uVR] ")
      continue()
    endif()
    if(NOT line STREQUAL "" AND NOT line MATCHES "fusedrnn3cpu${length}${ISA}")
      get_filename_component(name ${object} NAME)
      message(SEND_ERROR "${name} (${ISA}) defines ${line}")
    endif()
    math(EXPR seen "0${seen} + 1")
  endforeach()
endforeach()
if(NOT seen GREATER 10)
  message(FATAL_ERROR "only '${seen}' symbols seen in '${OBJECTS}'")
endif()
message(STATUS "${seen} symbols of ${ISA} looked at")
