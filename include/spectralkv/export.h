// SPECTRALKV_API marks what libspectralkv exports; everything else is hidden.
#pragma once

#if defined(SPECTRALKV_STATIC)
#define SPECTRALKV_API
#elif defined(_WIN32)
#if defined(SPECTRALKV_BUILDING)
#define SPECTRALKV_API __declspec(dllexport)
#else
#define SPECTRALKV_API __declspec(dllimport)
#endif
#else
#define SPECTRALKV_API __attribute__((visibility("default")))
#endif
