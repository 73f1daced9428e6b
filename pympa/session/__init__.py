"""The entry point for programs: MPI ranks as a mesh, and the end of a job."""
